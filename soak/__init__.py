"""The soak test: thousands of misbehaving clients against one relay.

    python -m soak --minutes 10 --connections 2000 --transport both

starts a real `twistd relayd` with short timeouts and keeps about so many sessions open
through it.  Each follows a script drawn at random: it sends a request, moves bulk data,
half-closes, resets, stalls, idles, leaves during the dial.  What each end sees is
checked, and so is the relay's log line for each session.

There are UDP flows as well, and floods from more ports than the relay's table holds, in
which flows in use must keep their ports.  The relay's wall clock is set by hours now
and then, in its own process.  Now and then the relay is stopped (SIGSTOP) for ten
seconds: it may be late by that time, but must not time anything out because of it.

In the end the relay must have as many descriptors, and as much memory, as at the start,
and one thread more at most, from /proc.

Everything is on loopback, in two processes, this one and the relay; both need about
two descriptors for each connection, and the relay two more for each flow.  Ctrl-C
stops both, and prints the summary so far.

- `run`: one soak from start to end; `verdict`: the rules that it must meet;
- `relay`: the relay's process, and readings of it; `clock`: its wall clock, which is
  set; `stops`: when it was stopped; `log`: parses its log;
- `kernel`: whether this machine had too little memory for TCP;
- `timeouts`: the relay's timeouts, and how late it may be;
- `servers`: the servers of its TCP listeners; `traffic`: all TCP sessions;
  `scripts`, `roles`: what the two ends of each do; `ends`: one end;
  `pattern`: its bytes;
- `echoes`: the servers of its UDP listeners; `flows`: all UDP flows; `flow_scripts`:
  what each client does; `datagrams`: one flow;
- `violations`: broken rules, counted and printed.
"""
