"""The benchmark: relayd compared with other relays, in one run on one machine.

`python -m bench` starts each relay in turn on loopback, puts it under load with
established programs (iperf3, wrk, h2load) where there is one that fits, and reads
the relay's use of CPU and memory from the kernel.  `make bench`, `make bench-quick`
and `make bench-check` run it.

- `children`: child processes, always stopped, and readings of them;
- `relays`: the relays, and how each is started;
- `origins`: the servers;
- `loads`: load generators that are programs; `connections` and `datagrams`: our own;
- `places`: this machine, or three network namespaces in a row;
- `streams`, `growth`, `udp`, `scrapes`: the measurements; `workloads`: for which
  figures and relays; `rounds`: all of them, in rounds and windows;
- `pythons`: the Pythons that relayd is measured under;
- `figures`: medians, ratios, limits; `facts`: the machine and the programs;
- `report`: what is printed; `page`: Markdown and JSON; `charts`: PNG and SVG, of what
  `charted` says.
"""
