"""The stream engine: layers' weights are kept in host memory or on NVMe and copied to the GPU ahead of their use.

Loading: `tensor_groups` and `layout` place the tensors of each block in one contiguous piece of memory.
`checkpoint_weights` fills pieces from a checkpoint through a `write_target`; `stored_weights` reads them from a store,
which `write_store` writes once. `weights` chooses between the two, and `host_memory` allocates page-locked memory.

Stores on disk: `store` defines the format, `data_files` reads and writes its files, `store_lock` guards it against
other processes, and `manage_stores` lists, verifies and removes stores for the user.

Running: `read_ahead` reads pieces from disk, `transfer` copies them to the GPU, `ring` schedules the copies ahead of
the pass, `expand` turns codes back into weights, and `stalls` measures how long the GPU waits. `engine` runs the
unmodified transformers model.
"""
