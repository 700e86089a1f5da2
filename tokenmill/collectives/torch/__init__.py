"""Where torch meets the collectives. Needs the extra `tokenmill[torch]`.

`import tokenmill.collectives.torch.backend` registers the backend "tokenmill" with
`torch.distributed`; `ddp_hook` has a communication hook for DistributedDataParallel. Nothing else
of tokenmill imports this folder.
"""
