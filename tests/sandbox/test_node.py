import json
import shutil
import subprocess

import pytest

from perqueue.sandbox import BadToken, Refuse

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node, to speak as Per's Node.js wrapper does")

# The wrapper's two functions: plain GET requests with a bearer token, an exception unless `ok` is true.
WRAPPER = """
const http = require('http');
const querystring = require('querystring');
const base = process.argv[1];
function call(token, path, params) {
  return new Promise((resolve, reject) => {
    const url = `${base}/${path}?${querystring.stringify(params)}`;
    http.get(url, {headers: {Authorization: `Bearer ${token}`}}, (response) => {
      let body = '';
      response.setEncoding('utf8');
      response.on('data', (chunk) => { body += chunk; });
      response.on('end', () => {
        const answer = JSON.parse(body);
        if (answer.ok) resolve(answer.result); else reject(new Error(answer.error || answer.message));
      });
    }).on('error', reject);
  });
}
const addActivity = (token, billingId, userId, activityTypeId) =>
  call(token, 'activities.add', {billingId, userId, activityTypeId});
const getReport = (token, start, end) => call(token, 'reports.get', {start, end});
"""


def _node(per, program):
    caught = "catch((error) => { console.log(JSON.stringify(error.message)); })"
    script = f"{WRAPPER}\n(async () => {{ {program} }})().{caught};"
    answer = subprocess.run(
        [NODE, "-e", script, per.url], capture_output=True, text=True, check=True, timeout=30
    )
    return json.loads(answer.stdout)


def test_the_node_wrapper_adds_an_activity(per):
    """Any text arrives as it was given, and the transaction ID comes back."""
    text = "GROUP + 日本 & 100% #1 😀 '?/=\\n"
    literal = json.dumps(text)
    result = _node(
        per,
        f"const r = await addActivity('{per.activity_token}', {literal}, {literal}, 't');"
        "console.log(JSON.stringify(r));",
    )
    (activity,) = per.activities
    assert result == {"transactionId": activity.transaction_id}
    assert (activity.billing_id, activity.user_id) == (text, text)


def test_the_node_wrapper_gets_a_report(per, add):
    """JavaScript's own timestamps, with milliseconds, are understood; so are no timestamps at all."""
    add("GROUP_A", "USER_1", "t")
    result = _node(
        per,
        "const end = new Date(Date.now() + 60000);"
        "const start = new Date(end.valueOf() - 7 * 24 * 60 * 60 * 1000);"
        f"const r = await getReport('{per.reporting_token}', start.toISOString(), end.toISOString());"
        f"await getReport('{per.reporting_token}');"
        "console.log(JSON.stringify(r));",
    )
    assert result["activityTypes"] == {"t": {"billingIds": {"GROUP_A": {"unique": 1}}}}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Refuse("no", key="error"), "no"), (Refuse("no"), "no"), (BadToken(), "invalid_auth_token")],
)
def test_the_node_wrapper_throws_the_reason(per, fault, reason):
    """A refusal is an exception there, whichever key its reason comes under."""
    per.set_fault(fault)
    assert _node(per, f"await addActivity('{per.activity_token}', 'b', 'u', 't');") == reason
