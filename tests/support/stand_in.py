"""Quick stand-ins for the demo's two programs: `python stand_in.py vllm PORT` and `python stand_in.py serve CONFIG`.

The second answers on the data port by itself and reports, on the admin port, what Hemostat would: every answered
request shadowed, and scored a little later. HEMOSTAT-like trouble is asked for by STAND_IN_TROUBLE.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from tests.support.fake_vllm import FakeVllm, serving

from hemostat_lab.demo.runner import SERVED_NAME

TROUBLE = os.environ.get("STAND_IN_TROUBLE", "")
FIGURES = {
    "kl_nats": {"estimate": 0.5, "ci95": [0.4, 0.6], "bound": "lower"},
    "total_variation": 0.3,
    "top1_agreement": 0.6,
    "covered_mass": 0.9,
}
EVENTS = [
    {
        **{"at": 1e9, "decision": "propose", "reason": "learned", "version": "ab" * 16},
        **{"why": "learned from 3001 tokens", "evidence": {}},
    }
]


def status(answered: int, settings: dict[str, Any]) -> dict[str, Any]:
    stuck = TROUBLE == "stuck"
    scored = 0 if stuck else answered
    return {
        "requests": {
            "shadowed": answered,
            "scored": scored,
            "skipped": {},
            "dropped": {},
            "pending": answered - scored,
        },
        "tokens_scored": 10 * scored,
        "top_k": settings["shadow"]["top_k"],
        "raw": FIGURES,
        "calibrated": FIGURES,
        "profile": {"version": "identity", "family": "identity", "mode": settings["calibration"]["mode"]},
        "calibration": {
            "kinds": [
                {
                    "kind": "chat text sampled",
                    "requests": scored,
                    "share": 1.0,
                    "summary": "identity; needs about 34 more",
                },
            ]
        },
        "queue": {"depth": answered - scored, "lag_seconds": 0.0},
        "reference": {"state": "mismatch" if TROUBLE == "mismatch" else "ready", "detail": "64 ids against 65"},
        "background": "adapter abababab: 38 of about 56 conversations of chat text, 4 min left",
        "learner": {"state": "learning", "detail": "", "tokens": 10 * scored},
        "engines": {"live": 1, "acknowledged": []},
        "records_written": 0,
    }


def serve(config: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    print(json.dumps(settings), flush=True)
    if TROUBLE == "serve dies":
        time.sleep(1.0)
        sys.exit("no reference today")
    fake = FakeVllm(model=SERVED_NAME, status=500 if TROUBLE == "all fail" else None)

    class Admin(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            profiles = self.path == "/api/v1/profiles"
            body = json.dumps({"events": EVENTS} if profiles else status(len(fake.requests), settings)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(fake, settings["listen"]["port"]):
        HTTPServer(("127.0.0.1", settings["admin"]["port"]), Admin).serve_forever()


def main() -> None:
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]))
    else:
        if TROUBLE == "vllm dies":
            sys.exit("no memory today")
        print("environment", os.environ["HEMOSTAT_ADMIN_URL"], os.environ["HEMOSTAT_ENGINE_TOKEN"], flush=True)
        uvicorn.run(FakeVllm(model=SERVED_NAME), host="127.0.0.1", port=int(sys.argv[2]), lifespan="off", ws="none")


if __name__ == "__main__":
    main()
