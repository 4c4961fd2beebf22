"""The spool: sampled captures on disk, to be scored later (`spool.path`). It needs the extra `spool`.

    spooled     a capture as the spool keeps it
    keys        the key of a spool, which wraps a fresh data key for each file
    journal     the captures of the segment that is still open, synced each second
    columns     captures as Arrow columns, and back: the schema of segments
    objects     folders in an object store
    segments    segments: Parquet files, encrypted as a whole
    spool       the spool of a control process: journal, segments, limits

docs/formats.md has the schema.
"""
