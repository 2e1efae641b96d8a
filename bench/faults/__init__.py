"""A campaign of faults: `python -m cbs_opt.bench.faults`.

Damaged files, forged proofs, signals, full disks, missing permissions, small memory, closed streams, clocks that
jump, processes that share a store: nothing of this may crash a command, show a traceback, hang, lose data, or
lead to a wrong answer. Every case follows from a seed, its class and its number: one that failed can be repeated.

- `verdict`: what can go wrong; `processes`: commands in children, with limits and signals; `material`: small valid
  files of every format; `damage`: files and arrays that are damaged at random;
- `formats`, `proofs`, `options`: cases that read, in children that are cheap;
- `signals`, `surroundings`: cases that run whole commands;
- `campaign`: classes, sizes, the table.

Room: bench. Nothing but its command imports it.
"""
