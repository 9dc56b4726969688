"""Files and batch jobs: storage on disk, validation, worker. Knows requests as lines of a file; knows no HTTP."""
