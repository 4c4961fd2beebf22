"""Adapters, live: collected texts, the child process that makes an adapter of them, and the copies that judge it.

Prompts and answers are kept in memory only. While an adapter is made, its process reads their token ids from a folder
that only this user can read, deleted when the process ends, or at the next start.

    assembly         the live parts of adapters, made and connected
    build_messages   the job of the process that makes an adapter
    builder          runs the process that makes an adapter
    client           collects texts of the learning side, has an adapter made of them in a process of its own
    collected_texts  the newest texts of the learning side, as token ids, in memory
    folders          the two checkpoints' folders on this machine
    job              the folder of one build
    judge            the control process's end of the judge
    judge_messages   messages between the control process and the judge
    judge_requests   the requests that wait for the judge, and how long a record may be
"""
