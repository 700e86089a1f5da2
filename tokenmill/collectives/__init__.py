"""Collectives as programs: written once, proved, printed, simulated and executed.

A **task** (`task.py`) says what is to be done: an operation over `ranks` ranks and `count`
elements. A **plan** says how: an algorithm and its parameters. `catalog.write_program(task, plan)`
writes the **program** (`program.py`): for each rank its buffers and a list of steps.
`catalog.write_rank` writes the list of one rank without the others'. `prove.prove` shows that a
program does its task.

What an executor needs to know
------------------------------

*Buffers.* `RankProgram.buffers` names the rank's buffers and their sizes in elements; all exist,
with one-dimensional contiguous storage, before the first step. Those of no elements are left out.

- `data` (and `input`, `output` of all-to-all) belong to the caller; any other is scratch.
- A buffer with `is_wide` holds accumulators: f32 where the data are f16 or bf16, the data's own
  type otherwise. Copying into it widens, copying out of it rounds, reducing into it adds wide. It
  never travels.

What each operation finds and leaves (block r is `task.blocks[r]`, a range of elements):

| op | before | after |
| --- | --- | --- |
| all_reduce | `data`: own vector | `data`: the reduction |
| reduce | `data`: own vector | at root, `data`: the reduction; elsewhere unspecified |
| broadcast | at root, `data`: the vector | `data`: root's vector |
| reduce_scatter | `data`: own vector | block r of `data`: the reduction; the rest unspecified |
| all_gather | block r of `data`: own block | `data`: all blocks |
| all_to_all | `input`: block for rank 0, for 1, ... | `output`: block of rank 0, of 1, ... |
| send_recv | at root, `data`: the vector | at peer, `data`: root's vector |
| barrier | nothing; `token`, one element, carries no meaning | every rank has entered |

Operations are in place and may leave partial results in elements that are unspecified: whoever must
keep its argument passes a copy. A reduction with `avg` is a sum which the executor divides by the
number of ranks at the end, in the result alone.

*Steps.* `Send(chunk, peer, tag)`, `Recv(chunk, peer, tag)`, `RecvReduce(chunk, peer, tag)` (chunk
:= chunk op received), `Copy(source, target)`, `Reduce(source, target)` (target := target op
source). A chunk is one or more ranges of a buffer, `chunk.ranges`, packed one after the other into
one message. Chunks are never empty, and both ends of a message have the same `chunk.count`.
Messages hold elements of the data's type, also those that are received into a wide buffer.

*Order.* `step.after` holds the indices, in the same rank's list, of the steps that must be complete
before this one may start; they are all smaller than its own. A send is complete when its chunk may
be overwritten. Two ways of running a list are proved, and both give the same bits:

1. In list order, one step at a time, where a send never waits for the receiver (it copies the
   message or hands it to a thread).
2. By dependencies alone: any step starts once its `after` are complete. Here a send may wait until
   the receiver has come to the matching step (no buffering at all), so bounded buffers cannot
   deadlock. All steps that are ready must be able to make progress: a send that waits must not keep
   a ready receive from starting. This way gives the overlap that pipelined algorithms are written
   for.

*Messages.* Those with the same sender, receiver and tag form a lane: the k-th send is received by
the k-th receive, in list order on both sides, so on each lane sends start in list order, and so do
receives. Messages of different tags between two ranks may overtake each other; a transport with one
stream for each pair puts the tag into the header and sets early ones aside. `RankProgram.lanes()`
lists what will be sent and received.
"""
