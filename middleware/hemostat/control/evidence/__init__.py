"""Evidence of all replicas, judged by the one that leads.

    followers: scored request -> units -> Outbox -> stream in the store
    leader:    stream in the store -> Inbox -> UnitConsumers -> alarms, profiles, outcomes, what is learned
               its own scored requests, directly --^

    units       what is sent
    outbox      units that wait to be sent: numbered, in batches, each sent again until the store has it
    own_units   units that the leader has counted itself, in case that another replica comes to lead
    inbox       batches as the leader takes them, and which of them it has counted already
    positions   the number of the last unit that was counted, by sender
    lane        both of one stream, and the positions
    checkpoint  the states that evidence goes into and the positions, written in one step
    exchange    what is sent of a scored request, and what becomes of it at the leader
    deployment  what all replicas say of themselves

Invariants:
- A unit is counted at most once. The position that says so is written in one step with the states that the unit went
  into: a new leader has both or neither. An entry is removed from the stream after that only.
- Units of one sender are counted in the order of their numbers.
- A replica that dies loses what waits in its outbox, at most `outbox.MAX_UNITS`; the leader also what it has counted of
  its own since the last checkpoint, at most `checkpoint.MAX_UNSAVED` units. Nothing else is lost while the store lives.
- While the store does not answer, followers keep their newest units, and the last leader counts its own.
- No unit has a token id in it but those of `units.LearnedUnit`, which are sums over several requests.
"""
