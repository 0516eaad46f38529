"""This device first, a cloud when it is unsure: who answered, and why.

    python examples/hybrid.py "打开微信" "cook me a dinner"
    CLOUD_KEY=… python examples/hybrid.py "打开微信" \\
        --cloud-base-url https://api.example.com/v1 --cloud-model autoglm-phone-9b

Without --cloud-base-url the cloud is a script in this file: nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from autoglm_gguf import AutoGLM, CloudModel, HybridClient, HybridPolicy, default_pair

ANSWER = '<think>Ask back.</think><answer>do(action="Interact")</answer>'


class ScriptedCloud(BaseHTTPRequestHandler):
    """Gives every request the same answer, as OpenAI's API streams it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "delta": {"content": ANSWER}, "finish_reason": "stop"}
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None: ...


def start_scripted_cloud() -> str:
    """Its base URL; it ends with the program."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ScriptedCloud)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask this device, and a cloud behind it.")
    parser.add_argument("task", nargs="*", default=["打开微信", "cook me a dinner"])
    parser.add_argument("--cloud-base-url")
    parser.add_argument("--cloud-model", default="scripted")
    options = parser.parse_args()
    url = options.cloud_base_url or start_scripted_cloud()
    cloud = CloudModel(url, options.cloud_model, api_key=os.environ.get("CLOUD_KEY"))
    policy = HybridPolicy(escalate_below=0.9, send_images=False)  # screenshots stay here
    with HybridClient(AutoGLM.load(default_pair().text), cloud, policy) as model:
        for task in options.task:
            step = model.act(task)
            print(f"{task}: {step.action.render()}")
            if step.route:  # of a HybridClient it is always there
                print(f"  [{step.route.source}: {step.route.reason}]")
