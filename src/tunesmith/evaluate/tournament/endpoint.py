"""A judge behind an OpenAI-compatible endpoint: POST BASE/chat/completions, several at a time, each tried a few times.

The key comes from the environment (OPENAI_API_KEY) and goes into one header, nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ConfigError, JudgeError
from tunesmith.evaluate.tournament.prompts import Message

if TYPE_CHECKING:
    import httpx2

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # answers that a later try may change
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclass(frozen=True)
class Endpoint:
    """`model` at `base_url`, which includes the version (`.../v1`); `parallel` requests at once, `tries` each."""

    model: str
    base_url: str
    key: str | None = field(default=None, repr=False)
    parallel: int = 4
    tries: int = 5
    max_tokens: int = 1024
    timeout: float = 120.0
    pause: float = 1.0  # seconds before the second try; doubled each time

    @property
    def name(self) -> str:
        """The model's name: what the file of judgments calls the judge."""
        return self.model

    def replies(self, conversations: Iterable[Sequence[Message]]) -> Iterator[tuple[int, str]]:
        """(number, answer) as they come. Raises JudgeError once one failed; answers under way then still come first."""
        client = self._client()
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="judge")
        waiting = iter(enumerate(conversations))
        running: dict[Future[str], int] = {}
        failed: JudgeError | None = None
        try:
            while True:
                if failed is None:
                    for number, messages in islice(waiting, self.parallel - len(running)):
                        running[pool.submit(self._ask, client, messages)] = number
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    try:
                        answer = future.result()
                    except JudgeError as error:
                        failed = failed or error
                        continue
                    yield number, answer
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
        if failed is not None:
            raise failed

    def _client(self) -> httpx2.Client:
        try:
            import httpx2
        except ImportError:
            raise ConfigError("--judge: an endpoint needs httpx2; install it: pip install 'tunesmith[judge]'") from None
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"--base-url {self.base_url}: should begin with http:// or https://")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.Client(headers=headers, timeout=self.timeout, follow_redirects=False)

    def _ask(self, client: httpx2.Client, messages: Sequence[Message]) -> str:
        import httpx2

        url = f"{self.base_url.rstrip('/')}/chat/completions"
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": self.max_tokens}
        problem = ""
        for attempt in range(self.tries):
            try:
                answer = client.post(url, json=body)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                delay = None
            else:
                if answer.status_code == 200:
                    return _content(answer, url)
                problem = f"HTTP {answer.status_code} {answer.text[:200].strip()}"
                if answer.status_code not in AGAIN:
                    raise JudgeError(f"{url}: {problem}; correct the endpoint, the model or the key")
                delay = answer.headers.get("retry-after")
            if attempt + 1 < self.tries:
                time.sleep(_seconds(delay, self.pause * 2**attempt))
        raise JudgeError(
            f"{url}: failed {self.tries} times ({problem}); what was judged is kept: run the same command again"
        )


def _content(answer: httpx2.Response, url: str) -> str:
    """The text of an answer; an empty one is a verdict that cannot be read, not an error."""
    try:
        said: Any = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise JudgeError(f"{url}: its answer is not one of /chat/completions; check --base-url") from None
    return said if isinstance(said, str) else ""


def _seconds(told: str | None, otherwise: float) -> float:
    """How long to wait: as the server says in whole seconds, else the growing pause; never longer than a minute."""
    return min(float(told) if told is not None and told.isdecimal() else otherwise, LONGEST_WAIT)
