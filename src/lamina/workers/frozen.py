"""Imported last by the fork server: what it has loaded is left alone by the garbage collector.

A collection in a worker would write to every object that it shares with the fork server and so copy
its memory; and at the fork server's exit it would walk all of torch, which takes a second.
"""

from __future__ import annotations

import gc

gc.freeze()
