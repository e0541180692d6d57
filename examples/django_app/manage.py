"""Django's command line.

export PERQUEUE_OUTBOX=activities.db PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
python manage.py migrate && python manage.py runserver
curl -X POST 'http://127.0.0.1:8000/export?company=ACME&user=USER_1'
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "settings")
    execute_from_command_line(sys.argv)
