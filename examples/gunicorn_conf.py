"""gunicorn for an application that records: workers that fork from a loaded application, and are recycled.

    gunicorn --config gunicorn_conf.py 'flask_app:create_app()'

No hook is needed. A queue made before the fork works on both sides of it; the operating system elects the
process that delivers, and when that one is recycled or killed another takes over within two seconds.
"""

bind = "127.0.0.1:8000"
workers = 2
threads = 4

preload_app = True  # with it and without it: perqueue notices the fork

# Long enough for the requests in progress and for perqueue's exit_timeout (2 s) after them. A worker that is
# killed all the same has its activities in the outbox.
graceful_timeout = 30

# No close() in worker_exit: gunicorn may also call that hook in the arbiter, whose queue later workers
# inherit. perqueue delivers and closes when the worker's interpreter exits.
