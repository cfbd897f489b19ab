"""Where finished files lie: a folder, or an object store behind fsspec; one small interface over both."""
