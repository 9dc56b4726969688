"""Commands made of several runs, the calibration, and the HTTP API that starts runs. Each run is a process."""
