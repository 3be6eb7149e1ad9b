"""Access to private names of other libraries, one file per library; no other file uses private names."""
