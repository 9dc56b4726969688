"""The locustfile: a class of users for each workload, chosen by name on Locust's command line or in its web page."""

from __future__ import annotations

# Import by the package's name, because Locust runs this file by its path.
from lab_load.generator.client import Client
from lab_load.workloads.workload import WORKLOADS

for _name, _make in WORKLOADS.items():
    _class = type(_name.capitalize(), (Client,), {"scenario": _name, "__doc__": _make.__doc__, "__module__": __name__})
    globals()[_class.__name__] = _class
del _name, _make, _class, Client  # Locust offers every user class that it finds in this module
