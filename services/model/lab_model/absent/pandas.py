"""Stands before pandas on the path of Ray's processes: Ray Serve imports it where it can and does without where not.

In an environment shared with the ui it is there, and costs each of Ray's processes half a second and 65 MB.
"""

raise ImportError("pandas is kept out of the model service")
