"""What can go wrong between us and a sampler, by what the caller should do about it.

SamplerError
├─ SamplerUnavailable   connection, protocol, deadline or 5xx: send a fresh request to a healthy engine
│  ├─ SamplerGone       its row is gone: the keeper stopped or replaced it
│  └─ AdapterRefused    a healthy engine cannot load these files: asking again changes nothing
├─ ModelNotServed       404 on the model: the adapter is not loaded (a restarted server has lost every one)
├─ AdapterNotVisible    404 on the path: sampler and trainer do not share the directory, or not under this name
├─ SamplerRejected      400: the request is wrong and stays wrong; `param` names the field
└─ SamplerMisbehaved    an answer that breaks the protocol: nothing in it may be trained on

Does not cover: whether the served weights are the right ones, which the publication's proof decides.
"""

from app.net.endpoint import show_url


class SamplerError(Exception):
    """`url` is the sampler's base address (or whose sampler it is), without the credentials that it may hold."""

    def __init__(self, message: str, *, url: str) -> None:
        self.url = show_url(url) if "://" in url else url
        super().__init__(f"{message} ({self.url})")
        self.reason = message


class SamplerUnavailable(SamplerError):
    """`status` is the answer's, where there was one."""

    def __init__(self, message: str, *, url: str, status: int | None = None) -> None:
        super().__init__(message, url=url)
        self.status = status


class SamplerGone(SamplerUnavailable):
    def __init__(self, sampler_id: str) -> None:
        super().__init__("the sampler was stopped or replaced", url=sampler_id)


class AdapterRefused(SamplerUnavailable):
    pass


class ModelNotServed(SamplerError):
    pass


class AdapterNotVisible(SamplerError):
    def __init__(self, ours: str, theirs: str, *, url: str) -> None:
        where = f"{theirs} there, {ours} here" if theirs != ours else f"{ours}, there as here"
        super().__init__(f"the sampler does not find the adapter directory ({where})", url=url)


class SamplerRejected(SamplerError):
    def __init__(self, message: str, *, url: str, param: str | None) -> None:
        super().__init__(message, url=url)
        self.param = param


class SamplerMisbehaved(SamplerError):
    pass
