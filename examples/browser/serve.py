"""Serves the page on this machine, with the headers without which a browser gives a page no threads.

npm ci && python serve.py [BUNDLE_FOLDER] [PORT]
"""

import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent
SHIPPED = PAGE.parents[1] / "models" / "hd"


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, model: Path) -> None:
        self.model = model
        super().__init__(*arguments, directory=str(PAGE))

    def translate_path(self, path: str) -> str:
        inside = path.startswith("/model/")
        self.directory = str(self.model if inside else PAGE)
        return super().translate_path(path.removeprefix("/model") if inside else path)

    def guess_type(self, path: str) -> str:
        return {".mjs": "text/javascript", ".wasm": "application/wasm"}.get(Path(path).suffix) or super().guess_type(
            path
        )

    def end_headers(self) -> None:
        # Cross-origin isolation: SharedArrayBuffer, and with it threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def server(model: Path = SHIPPED, port: int = 0) -> ThreadingHTTPServer:
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, model=model))


if __name__ == "__main__":
    model, port = (*sys.argv[1:], *(SHIPPED, 8080)[len(sys.argv) - 1 :])
    with server(Path(model), int(port)) as serving:
        print(f"http://127.0.0.1:{serving.server_port}/", flush=True)
        serving.serve_forever()
