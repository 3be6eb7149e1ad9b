"""Private names of other libraries, one file per library; no other file uses any."""
