"""The outbox in a PostgreSQL database, for any number of recorders and drainers on any number of hosts.

What differs from the file: numbers come from a sequence, so that they have gaps and are not committed in
order; every drainer claims some of what is pending, and holds it by a lease that its heartbeat extends.
"""
