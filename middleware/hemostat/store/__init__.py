"""Where profiles, events and state are kept: in memory, SQLite or PostgreSQL.

errors            counts the operations of the store that have failed, and logs them
factory           makes the store that `store.url` names
memory            a store in memory, which ends with its process
postgres          a store in a PostgreSQL database
postgres_session  one session with a PostgreSQL server: its settings, and statements that end in time
protocol          the interface of every store, and how it fails
schema_1          takes along the states of a store that an earlier version has written
spent_alpha       counts how many tests of one sort have begun, and so the alpha that they have spent
sqlite            a store in one SQLite file, on a local disk
states            writes and reads a state in the one format that states have
thread            the thread in which the event loop has a store's calls executed, one after the other
writer            the one place from which the control process writes to the store
"""
