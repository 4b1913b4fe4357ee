"""A process group on a host that goes wrong where NCCL does.

gloo forgives much that NCCL does not: it takes operations of a group in any order, matches messages
by tag, and connects two ranks whenever they first talk. A program that needs this passes every test
on hosts and hangs on GPUs. The strict group moves data by gloo and keeps NCCL's rules:

- Operations of a group run one after the other, on each rank in the order in which they were
  posted. A receive that was posted early holds up whatever comes after it in its group.
- The first operation of a group is a collective, which all of its ranks take part in; neither
  messages nor a barrier are.
- A batch of messages is one operation. Inside of it there is no order.
- A send is done when it was received, and not before.
- Messages have no tags: the first that was sent is the first that is received.
- Sizes and dtypes of what meets are equal, and collectives of all ranks are the same.
- Only tensors of the device travel, neither objects nor tensors of the hosts.

Each broken rule raises `StrictError`, which says what NCCL would do; what would wait for ever is
told by name after a time. See `group` for how, and `host_made` for what cannot be seen.
"""
