"""A rank on paper: the real code on tensors that have shapes and no content.

Its device is torch's "meta", its process groups are torch's `fake` ones, so one process stands for
any rank of any layout, and a model of any size takes no memory. Nothing is computed; shapes,
dtypes, devices, names of weights, arguments and groups are all real. Host tensors, such as tokens,
lengths and agreements, keep their content, and so do integers that are made of them on the device.

What has no answer without content or without peers is answered here, each in one place:

- `groups`: the world and its groups; what the other ranks add to a sum on the host.
- `contents`: what is in the device's integers.
- `mode`: numbers that are read back from the device; what a collective returns.
- `experts`: how many tokens each expert gets.
- `traffic` and `memory` record what `mode` sees.

The answers are process-wide and stay: a paper rank is a process of its own.
"""
