"""The supervisor of `hemostat serve`, `relay` and `control`. It owns the listening sockets, starts, restarts, replaces
and stops the relays and the control process, and hands all of it on to a successor. The relays continue to serve while
the control process is down; connections wait in the sockets' queues while no relay is running.

sockets     the data port's and the admin port's listening sockets: bound here, or passed on by systemd
child       one child process
role        which of them a command runs
relays      the relay processes, those that were replaced and let their requests end, and a spare one
control     the control process: one at a time
relay_admin for relays without one: a process that shows their counters
commands    what a signal or a successor asks for
takeover    the messages between a supervisor and its successor
service     the service manager: systemd's sockets and notifications
run_folder  the folder of a running instance
serve       the whole
"""
