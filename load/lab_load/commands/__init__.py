"""Commands that do several runs, the calibration, and the HTTP API that starts runs. Each run is a process."""
