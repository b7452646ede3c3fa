"""What relaying costs: relayd beside other relays, in one run on one machine.

`python -m bench` starts each relay in turn on loopback, drives it with programs
that others wrote (iperf3, wrk, h2load) where there is one that fits, and reads
what the relay's process used from the kernel.  `make bench`, `make bench-quick`
and `make bench-check` run it.

- `children`: processes that are always stopped, and readings of them;
- `peers`: the relays, and how each is started;
- `origins`: what they relay to;
- `loads`: the load generators;
- `workloads`: how each is measured; `rounds`: all of them, in turn;
- `figures`: medians, ratios, limits; `facts`: the machine and the programs;
- `report`: what is printed; `page`: Markdown and JSON; `charts`: PNG and SVG.
"""
