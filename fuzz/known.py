"""Faults that are known and not yet mended: what they look like. A failure that matches is counted, not reported.

An entry goes as soon as its fault does; `python -m fuzz --all` looks past the list.
"""

from __future__ import annotations

import re

# (fuzzer, pattern in the failure's text, the fault in words)
KNOWN: tuple[tuple[str, str, str], ...] = (
    ("ops", r"^AssertionError: KVCache: |^death: \w+ KVCache;|KVCache, .*dimension",
     "a KVCache of sizes whose product passes 2^63"),
    ("ops", r"AssertionError: \w+, \w+: OverflowError", "a scalar that C cannot hold is an OverflowError"),
    ("ops", r"PackedWeight, \w+: (KeyError|ZeroDivisionError)", "PackedWeight checks too little"),
    ("ops", r": \w+, (eps|weight_offset|approximate|start_pos|interleaved|scale|dtype|activation|window|softcap|causal|"
     r"group_size|shape|gated|name|n|max_seq_len|batch|data): unnamed (Type|Value|UnicodeEncode)Error",
     "an option of another type is refused without the function's name"),
    ("ops", r"attention.*'window': (4611686018427387904|9223372036854775807)", "a window near 2^63 sees nothing"),
    ("ops", r"^hang: (pack|attention)\w*, \w+; given ndarray \S+ \(.*\b0, .*\d{8}", "empty arrays are looped over"),
    ("cache", r"^death: SIGBUS", "a full disk kills the process"),
    ("cache", r"locked against other threads", "an interrupt between two bytecodes leaves a cache locked"),
    ("cache", r"file of an interrupted save", "a file that an interrupted save left is loaded"),
    ("files", r"apply_chat_template: (TooLong|MemoryError)", "chat templates have no limit of time and memory"),
    ("files", r"\((.*, )?(fifo|zero|full|sparse) ", "what is no ordinary file is waited for, or read without a limit"),
    ("files", r"(load|encode|decode|generate): PanicException", "panics of the tokenizers library are no Exceptions"),
    ("files", r"KVCache.load: TokenError", "NumPy's reader raises a TokenError"),
    ("files", r"TooLong.*metadata", "a header is parsed again for every tensor"),
    ("files", r"(TooLong|MemoryError).*bytes of header", "a cache file's header may have any number of values"),
    ("mallocs", r"model: a MemoryError .* left another state", "a MemoryError leaves tokens in the cache"),
    ("threads", r"^death: \w+ toggled_threads|toggled_threads: other bits", "attention reads the thread count twice"),
    ("threads", r"toggled_isa: .* no ISA", "an op reads the table of kernels twice"),
    ("threads", r"readers: ", "a reader beside a writer reads lengths twice"),
    ("threads", r"handler_in_a_prompt", "a signal handler that calls an op during a prompt"),
)


def known(name: str, why: str) -> str | None:
    """The known fault that this failure shows."""
    return next((fault for fuzzer, pattern, fault in KNOWN if fuzzer == name and re.search(pattern, why)), None)
