"""What the application stores."""

from django.db import models


class Export(models.Model):
    company = models.CharField(max_length=100)
    user = models.CharField(max_length=100)
