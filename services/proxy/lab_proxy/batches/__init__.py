"""Files and batch jobs: storage on disk, validation, worker. Knows requests as lines of a file; nothing of HTTP."""
