"""torchrun with fewer words: ``python -m coma_ds.torchrun [OPTION ...] ENTRY [ARGUMENT ...]``.

A rank says itself why it ended, and leaves a report; where one failed, torchrun adds a trace of its
own code.  What torchrun alone knows, a port in use, becomes the report of the first rank.
"""

from __future__ import annotations

import logging
import os
import sys

AGENT = "torch.distributed.elastic.agent.server.api"
GOOD_END = "Error waiting on exit barrier"  # the node that holds the store has ended before this
WORDS = "TORCH_CPP_LOG_LEVEL"  # on that end torch writes a trace of its C++


def main(argv: list[str]) -> int:
    """The launcher's exit code, 2 where its port is taken."""
    told = WORDS not in os.environ
    os.environ.setdefault(WORDS, "ERROR")
    import torch.distributed as dist
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from coma_ds import comm, rank_report

    if told:
        del os.environ[WORDS]  # the ranks have words of their own
    logging.getLogger(AGENT).addFilter(lambda record: not str(record.msg).startswith(GOOD_END))
    try:
        run.main(argv)
    except ChildFailedError:
        return 1
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        message = f"error: {comm.port_in_use()}"
        sys.stderr.write(f"{message}\n")
        rank_report.write_report(2, message)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
