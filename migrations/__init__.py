"""The database's history: one idea a revision, file names begin with date and time (notes in NOTES.md)."""
