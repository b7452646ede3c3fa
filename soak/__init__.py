"""What lasts: thousands of clients that misbehave, and a relay that must hold.

    python -m soak --minutes 10 --connections 2000 --transport both

starts a real `twistd relayd` with short timeouts and keeps about so many sessions
going through it, each of which follows a script drawn at random: it sends a request,
moves bulk data, half-closes, resets, stalls, idles, leaves during the dial.  What each
end sees is checked, and so is the relay's log line about each session.

Beside them there are UDP flows, and floods from more ports than the relay has room
for, in which flows in use must keep their ports.  The relay's wall clock is set by
hours now and then, in its own process.  And now and then the relay is stopped
(SIGSTOP) for ten seconds: what it does late by that is not late, but it must not count
the time that it has missed against anybody.

The relay must end with what it began with: descriptors, threads, and memory, from
/proc.

Everything is on loopback, in two processes, this one and the relay; both need about
two descriptors for each connection, and the relay two more for each flow.  Ctrl-C
stops both, and prints the summary so far.

- `run`: one soak from start to end; `verdict`: the rules that it is held against;
- `relay`: the relay's process, and readings of it; `clock`: the wall clock that is set
  in it; `stops`: when it was stopped; `log`: what it logs;
- `kernel`: whether this machine had too little memory for TCP;
- `timeouts`: what the relay is started with, and how late it may be;
- `servers`: what is behind its TCP listeners; `traffic`: all TCP sessions;
  `scripts`, `roles`: what the two ends of each do; `ends`: one end;
  `pattern`: its bytes;
- `echoes`: what is behind its UDP listeners; `flows`: all UDP flows; `flow_scripts`:
  what each client does; `datagrams`: one flow;
- `violations`: what went wrong, counted and printed.
"""
