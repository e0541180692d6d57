"""The pages."""

from django.urls import path

from shop.views import export

urlpatterns = [path("export", export)]
