"""What users do."""

from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_POST

from shop.billing import count
from shop.models import Export


@require_POST
def export(request: HttpRequest) -> JsonResponse:
    """Do something for a user, and count it if it is done."""
    company, user = request.GET["company"], request.GET["user"]
    count(company, user)
    Export.objects.create(company=company, user=user)
    if "fail" in request.GET:
        raise RuntimeError("the export failed: it is rolled back, and not counted")
    return JsonResponse({"export": "done"})
