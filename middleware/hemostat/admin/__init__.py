"""The admin port: the application, what it shows, and its protection.

access           the access rules of the admin port
alerts           the one table of alerts
app              the admin port's routes
background       one line on the background work and the next decision
configuration    the configuration that is in force, as the supervisor reports it
console          the built-in page of the admin port
hardening        protects the admin port from whoever can reach it
history          the last hours of a few figures, for the console's charts, and what changed meanwhile
problems         the problems of the deployment now, worst first
problem_sources  where each problem is found
proxy_status     parts of the status that come from the relays' counters
recent           the recent growth of counters
server           the HTTP server of the admin port
status           the status that the admin port and the console show, with what is known now and what comes when
status_parts     the parts of the status, each with the parts of the control process that it is read from
"""
