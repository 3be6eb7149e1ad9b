"""Private names and replaced functions of other libraries, one file per library; no other file has any."""
