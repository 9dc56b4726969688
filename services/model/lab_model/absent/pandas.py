"""Hides pandas from Ray's processes: this folder comes first on their path. Ray Serve imports pandas if it can.

In an environment that is shared with the ui, pandas is installed and costs each of Ray's processes half a second and
65 MB.
"""

raise ImportError("pandas is hidden from the model service")
