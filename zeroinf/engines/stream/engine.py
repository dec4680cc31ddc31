"""The stream engine: an unmodified transformers model whose layers get their weights from a ring of device slots as
they run.

Input: a plan and a model source. Output: forwards of micro-batches, all of which run through a layer while it is in its
slot.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Embedding, Module

from zeroinf.distributed.control import Control
from zeroinf.engines.base import EngineStats, LoadListener, SilentListener, Stalls
from zeroinf.engines.stream.coded_weight import Product
from zeroinf.engines.stream.early_trials import begin_trials
from zeroinf.engines.stream.expand import ExpandedGroup, Expander
from zeroinf.engines.stream.experts import use_experts_kernels
from zeroinf.engines.stream.gather import Gatherer
from zeroinf.engines.stream.lockstep import LockStep
from zeroinf.engines.stream.norms import use_norm_kernels
from zeroinf.engines.stream.products import product_on_codes
from zeroinf.engines.stream.read_ahead import ReadAhead
from zeroinf.engines.stream.ring import Piece, Ring
from zeroinf.engines.stream.rotary import rotary_kernel, rotating
from zeroinf.engines.stream.routed import RestingPart, RoutedExperts, Routing, StoreReader, store_reader
from zeroinf.engines.stream.row_files import RowFiles
from zeroinf.engines.stream.stalls import StallMeter
from zeroinf.engines.stream.tensor_groups import Tensor, TensorGroup, group_tensors
from zeroinf.engines.stream.transfer import (
    ComputeStream,
    LinkMeter,
    PartitionedTransfer,
    ReplicatedTransfer,
    WeightTransfer,
)
from zeroinf.engines.stream.weights import Weights
from zeroinf.errors import ModelError
from zeroinf.model.experts import ExpertParts
from zeroinf.model.inspect import find_stacks
from zeroinf.model.quantized.expansion import Expansion, ExpansionSlot, expanded_bytes, expansions
from zeroinf.model.quantized.fused import require_kernels
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource, StoredRows
from zeroinf.model.unread import leave_out
from zeroinf.planner.coded_products import by_expert
from zeroinf.planner.memory import CHUNK_BYTES, PIECE_ALIGNMENT, SLOTS
from zeroinf.planner.plan import Plan
from zeroinf.planner.tiers import Tier, tiers, unit_tiers
from zeroinf.planner.wire import CODES

_HOST: Tier = "host"


class StreamEngine:
    """Blocks stream from host memory or from a store through a ring of device slots; the others stay on the device.

    Where weights cross as codes, every block rests as codes, on the device too, and is expanded as its turn comes. So
    are those of a checkpoint that is quantized already, by their own modules.
    Replicated, ranks are independent: each pulls all blocks over its own link. Partitioned, they step together and each
    pulls its part. Either way they read the node's one copy.

    Blocks of an encoder have a ring of their own, in which the first ones wait for the next prompts while the decoder's
    blocks go round: no copy depends on what the next pass will be.
    """

    name = "stream"
    shares_passes = True

    def __init__(
        self,
        plan: Plan,
        source: ModelSource,
        control: Control,
        device: torch.device,
        listener: LoadListener | None = None,
    ) -> None:
        self._device = device
        self._place = control.activity
        self._model = build_skeleton(source, plan.dtype)
        leave_out(self._model, plan.anatomy.unread)
        apart = [table.tensor for table in plan.anatomy.tables] if plan.embeddings != "gpu" else []
        groups, outside, tables = group_tensors(self._model, plan.wire, apart, plan.anatomy.experts, plan.expert_parts)
        self._row_files = RowFiles(_stored_rows(apart, source)) if plan.embeddings == "disk" else None
        kept = tables if self._row_files is None else ()
        if expansions(self._model):
            require_kernels(device)
        begin_trials(self._model, groups, CODES.get(plan.wire), device)
        self._expansion_slot: ExpansionSlot | None = None
        self._expanders: dict[bool, Expander] = {}
        pieces = [
            [group.nbytes for group in groups if (group.block or 0) == block]
            for block in range(len(plan.anatomy.blocks))
        ]
        of_blocks = tiers(
            list(map(sum, pieces)), plan.resident_blocks, plan.nvme_blocks, encoder=plan.anatomy.encoder_blocks
        )
        units = unit_tiers(of_blocks, list(map(len, pieces)), plan.host_units)
        where = [tier for own in units for tier in own]
        self._weights = Weights(
            plan,
            (*groups, outside, *kept),
            (*where, "gpu", *(_HOST for _ in kept)),
            self._model,
            source,
            control,
            device,
            listener or SilentListener(),
        )
        self._before: dict[int, Callable[[], None]] = {}
        """What a group of tensors needs before its first use in a pass, by its index; most residents need nothing."""
        self.link_stream: Any = None
        self._rings: list[tuple[int, Ring]] = []
        """Of what streams, with the number of the stack of blocks that each belongs to."""
        self._ring_of: dict[int, Ring] = {}
        """By the index of the group that passes through it."""
        self._ahead: list[ReadAhead] = []
        self._gatherer: Gatherer | None = None
        self._routing: Routing | None = None
        self._compute = ComputeStream(device)
        self._stalls = StallMeter(device, self._compute)
        self._link_meters: list[LinkMeter] = []
        self._metered = set[int]()
        """Blocks that stay on the device, beside others that stream."""
        try:
            streamed = [index for index, tier in enumerate(where) if tier != "gpu"]
            self.in_step = plan.fetch == "partitioned" and bool(streamed)
            in_host = [index for index in streamed if where[index] == "host"]
            numbers = range(len(groups) + 1, len(groups) + 1 + len(kept))
            in_memory = self._weights.keep([*in_host, *numbers])
            residents = [*(index for index, tier in enumerate(where) if tier == "gpu"), len(groups)]
            placed = list(self._weights.place(residents))
            # Once all is loaded: transformers converts weights in the modules that use them, and kernels are tried
            # meanwhile.
            self._choose_kernels(plan, groups)
            self._bind_residents(placed, groups, outside)
            if tables:
                self._gather(plan, tables, [in_memory[number] for number in numbers])
            if plan.wire != "model" and device.type == "cuda":
                torch.cuda.empty_cache()  # plans know nothing of where codes were made
            stacks = [list(layers) for _, layers in find_stacks(self._model)]
            self._walks = [0] * len(stacks)
            self._streamed_bytes = [0] * len(stacks)
            first = 0
            for number, stack in enumerate(stacks):
                own = [index for index in streamed if first <= (groups[index].block or 0) < first + len(stack)]
                self._streamed_bytes[number] = sum(groups[index].nbytes for index in own)
                self._stream(plan, control, number, own, groups, in_memory)
                first += len(stack)
            if self._rings:  # those that stream are metered by their rings
                self._metered = {
                    index for index, group in enumerate(groups) if group.entries is None and index not in self._ring_of
                }
            self._visit([block for stack in stacks for block in stack], groups, plan, in_memory)
        except BaseException:
            self.close()
            raise

    def _visit(
        self,
        blocks: Sequence[Module],
        groups: Sequence[TensorGroup],
        plan: Plan,
        in_memory: Mapping[int, torch.Tensor],
    ) -> None:
        """Let forwards take `blocks`, and parts of their experts, in step."""
        starts = [index for index, group in enumerate(groups) if group.entries is None]
        # Expanded weights have one place for all blocks, and parts of experts one module.
        ahead = 0 if self._expanders or plan.expert_parts > 1 or any(map(expansions, blocks)) else 1
        self._lock_step = LockStep(blocks, self._enter, self._leave, starts, len(groups), ahead)
        self._expansions: dict[int, list[Expansion]] = {}
        self._routing = self._begin_routing(plan, groups, in_memory)
        modules = dict(self._model.named_modules())
        for experts in plan.anatomy.experts if plan.expert_parts > 1 else ():
            first = starts[experts.block] + 1
            split = ExpertParts(
                modules[experts.module],
                experts.count,
                plan.expert_parts,
                partial(self._reach_part, first),
                partial(self._leave_part, first),
            )
            own = range(first, first + len(split.ranges))
            for index in own:
                self._expansions[index] = [split.expansion] if split.expansion is not None else []
            if self._routing is not None and first in self._ring_of:
                self._let_route(split, own, groups, in_memory)
        self._expansions |= {start: expansions(block) for start, block in zip(starts, blocks, strict=True)}

    def _begin_routing(
        self, plan: Plan, groups: Sequence[TensorGroup], in_memory: Mapping[int, torch.Tensor]
    ) -> Routing | None:
        """What brings only the experts that tokens of small passes are routed to; None where none pass through slots,
        or all are brought in any pass."""
        of_experts = [index for index in self._ring_of if groups[index].entries is not None]
        if not (of_experts and plan.routed_tokens):
            return None
        reader: StoreReader | None = None
        if any(index not in in_memory for index in of_experts):
            assert self._weights.used is not None
            pin = plan.pin_memory and self._device.type == "cuda"
            reader = store_reader(self._weights.used, [groups[index] for index in of_experts], pin=pin)
        return Routing(self._ring_of[of_experts[0]], plan.routed_tokens, len(groups), reader)

    def _let_route(
        self, split: ExpertParts, own: range, groups: Sequence[TensorGroup], in_memory: Mapping[int, torch.Tensor]
    ) -> None:
        """Let the experts of the layer `split`, whose parts are the groups `own`, be brought as tokens are routed."""
        assert self._routing is not None
        ring, first = self._ring_of[own[0]], own[0]
        put = self._putting(ring, groups[first])

        def bind(slot: int) -> None:
            put(slot)
            for expansion in self._expansions[first]:
                expansion.open()

        def release() -> None:
            for expansion in self._expansions[first]:
                expansion.close()

        parts = [RestingPart(index, groups[index], in_memory.get(index)) for index in own]
        self._routing.add(split, RoutedExperts(parts, ring, self._routing.reader, bind, release), own)

    def _reach_part(self, first: int, part: int) -> None:
        self._lock_step.reach(first + part)

    def _leave_part(self, first: int, part: int) -> None:
        self._lock_step.done(first + part)

    def _choose_kernels(self, plan: Plan, groups: Sequence[TensorGroup]) -> None:
        """Let the model compute by kernels, where they run, and make room for weights that are expanded before."""
        device = self._device
        by_kernels = use_experts_kernels(self._model, device, CODES.get(plan.wire))
        self._expansion_slot = _expansion_slot(self._model, plan, device)  # without weights that now rest as codes
        use_norm_kernels(self._model, device)
        self._rotate = rotary_kernel(self._model, device)
        if plan.wire != "model":
            passing = by_expert(plan.anatomy, plan.wire) if by_kernels else ()
            self._expanders = _expanders(groups, device, product_on_codes(device, groups), passing)

    def _bind_residents(
        self, placed: Sequence[tuple[int, torch.Tensor]], groups: Sequence[TensorGroup], outside: TensorGroup
    ) -> None:
        for index, piece in placed:
            group = (*groups, outside)[index]
            if not self._expanders or index == len(groups):
                views = _ready(group.views(piece))
                _bind(views)
                if group.entries is not None:  # the module has other experts before and after these
                    self._before[index] = partial(_bind, views)
            else:
                expanded = self._expander(group).on(group)
                _bind(expanded.views)
                self._before[index] = partial(_expand, group, expanded, piece)

    def _expander(self, group: TensorGroup) -> Expander:
        return self._expanders[group.entries is not None]

    def _gather(self, plan: Plan, tables: Sequence[TensorGroup], pieces: Sequence[torch.Tensor]) -> None:
        """Let embeddings read rows of `tables`, groups of one tensor each, whose `pieces` lie in host memory; or, if
        there are none, of files."""
        pin = plan.pin_memory and self._device.type == "cuda"
        self._gatherer = Gatherer(plan.anatomy.tables, plan.gathered_tokens, self._device, pin=pin)
        for number, group in enumerate(tables):
            (tensor,) = group.tensors
            ((module, _),) = tensor.sites
            assert isinstance(module, Embedding)
            if self._row_files is not None:
                self._gatherer.attach(module, partial(self._read_rows, self._row_files, tensor.names[0]))
            else:
                ((_, matrix),) = group.views(pieces[number])
                self._gatherer.attach(module, partial(_rows_in_memory, matrix))

    def _read_rows(self, files: RowFiles, name: str, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = files.read_s
        found = files.read(name, numbers)
        self._stalls.held_up(files.read_s - before)
        return found

    def _stream(
        self,
        plan: Plan,
        control: Control,
        stack: int,
        streamed: Sequence[int],
        groups: Sequence[TensorGroup],
        in_memory: Mapping[int, torch.Tensor],
    ) -> None:
        """Start the rings of a stack, and let the groups `streamed` take their tensors from them.

        Parts of experts have a ring of their own: what else their block has is in use while they come and go. Both
        share one way over the link, on which copies stay in the order of their use.
        """
        if not streamed:
            return
        unit = PIECE_ALIGNMENT if self._weights.used is None else CHUNK_BYTES
        transfer: WeightTransfer = ReplicatedTransfer(self._device)
        if self.in_step:
            largest = max(groups[index].nbytes for index in streamed)
            transfer = PartitionedTransfer(self._device, control.world.rank, control.world.size, largest, unit)
        self.link_stream = transfer.stream
        self._link_meters.append(transfer.meter)
        for are_experts in (False, True):
            own = [index for index in streamed if (groups[index].entries is not None) == are_experts]
            if own:
                ring = self._ring(plan, transfer, own, groups, in_memory)
                self._rings.append((stack, ring))
                for turn, index in enumerate(own):
                    self._ring_of[index] = ring
                    self._before[index] = self._taking(ring, turn, groups[index])

    def _ring(
        self,
        plan: Plan,
        transfer: WeightTransfer,
        streamed: Sequence[int],
        groups: Sequence[TensorGroup],
        in_memory: Mapping[int, torch.Tensor],
    ) -> Ring:
        device = self._device
        pieces = [Piece(groups[index].nbytes, in_memory.get(index)) for index in streamed]
        ahead: ReadAhead | None = None
        on_disk = [index for index, piece in zip(streamed, pieces, strict=True) if piece.memory is None]
        if on_disk:
            assert self._weights.used is not None
            spans = [transfer.span(groups[index].nbytes) for index in on_disk]
            pin = plan.pin_memory and device.type == "cuda"
            ahead = ReadAhead(self._weights.used, on_disk, spans, device, pin=pin)
            self._ahead.append(ahead)
        yields = plan.routed_tokens > 0 and groups[streamed[0]].entries is not None
        return Ring(pieces, SLOTS[plan.fetch], device, transfer, ahead, self._compute, self._stalls, yields=yields)

    def _taking(self, ring: Ring, turn: int, group: TensorGroup) -> Callable[[], None]:
        """A function that gives a block, or a part of its experts, the tensors of its `turn`."""
        put = self._putting(ring, group)
        return lambda: put(ring.acquire(turn))

    def _putting(self, ring: Ring, group: TensorGroup) -> Callable[[int], None]:
        """A function that gives a block, or a part of its experts, the tensors in a slot, by its number."""
        expanded = self._expander(group).on(group) if self._expanders else None
        views = [_ready(group.views(slot)) for slot in ring.slots] if expanded is None else [expanded.views]
        _bind(views[0])  # nothing stays on the meta device: transformers asks where a model is

        def put(slot: int) -> None:
            if expanded is None:
                _bind(views[slot])
            else:
                _expand(group, expanded, ring.slots[slot])

        return put

    def _enter(self, index: int) -> None:
        self._place.step()
        if index in self._metered:
            self._stalls.wanted()
        if index in self._before:
            self._before[index]()
        if self._expansion_slot is not None:
            self._expansion_slot.end = 0  # the block before has let go of it
        for expansion in self._expansions[index]:
            expansion.open(self._expansion_slot)

    def _leave(self, index: int) -> None:
        for expansion in self._expansions[index]:
            expansion.close()
        if index in self._metered:
            self._stalls.used()
        if index in self._ring_of:
            self._ring_of[index].release()

    @property
    def model(self) -> Any:
        return self._model

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """One pass over all blocks, which serves every micro-batch; over the decoder's where prompts are encoded.

        It computes on the stream that is current, whichever that was when weights were loaded.
        """
        self._walks[-1] += 1  # before all that may fail: `recover` carries out what is left of it
        if len(self._walks) > 1 and any("encoder_outputs" not in inputs for inputs in micro_batches):
            self._walks[0] += 1
        self._compute.follow()
        units: Sequence[int] | None = None
        if self._routing is not None:
            units = self._routing.begin(sum(inputs["input_ids"].numel() for inputs in micro_batches))
        try:
            with torch.inference_mode(), rotating(self._rotate):
                return self._lock_step.run([partial(self._model, **inputs) for inputs in micro_batches], units)
        finally:
            self._stalls.end_pass()

    def recover(self) -> bool:
        for expansion in (expansion for own in self._expansions.values() for expansion in own):
            expansion.close()
        for number, ring in self._rings:
            ring.finish(self._walks[number])
        self._stalls.end_pass()
        return True

    def stats(self) -> EngineStats:
        slots = [slot for _, ring in self._rings for slot in ring.slots]
        slots += [expander.slot for expander in self._expanders.values()]
        return EngineStats(
            passes=self._walks[-1],
            streamed_bytes_per_pass=self._streamed_bytes[-1],
            encodings=sum(self._walks[:-1]),
            streamed_bytes_per_encoding=sum(self._streamed_bytes[:-1]),
            routed_passes=self._routing.passes if self._routing is not None else 0,
            spared_bytes=self._routing.spared_bytes if self._routing is not None else 0,
            rows_read=self._row_files.rows_read if self._row_files is not None else 0,
            rows_read_s=self._row_files.read_s if self._row_files is not None else 0.0,
            shared_host_bytes=self._weights.shared_bytes,
            pinned_host_bytes=self._weights.pinned_bytes
            + sum(ahead.pinned_bytes for ahead in self._ahead)
            + (self._gatherer.pinned_bytes if self._gatherer is not None else 0)
            + (self._routing.pinned_bytes if self._routing is not None else 0),
            slot_bytes=sum(slot.numel() for slot in slots),
            link_busy_s=sum(meter.seconds() for meter in self._link_meters),
            stalls=self._stalls.total() if self._rings or self._row_files else Stalls(),
        )

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # copies still run ahead of a pass that never comes
        for ahead in self._ahead:
            ahead.close()
        if self._gatherer is not None:
            self._gatherer.close()
        if self._row_files is not None:
            self._row_files.close()
        if self._routing is not None:
            self._routing.close()
        self._weights.close()


def _stored_rows(tables: Sequence[str], source: ModelSource) -> dict[str, tuple[StoredRows, ...]]:
    """Where the rows of `tables` lie in the files of `source`. Raises ModelError where they do not as they are."""
    known = source.facts.rows if source.facts is not None else {}
    if strange := [name for name in tables if name not in known]:
        raise ModelError(
            f"rows of {strange[0]} cannot be read from the files of {source.name}: they do not lie there as they are",
            hint="--embeddings cpu, or a checkpoint in safetensors",
        )
    return {name: known[name] for name in tables}


def _rows_in_memory(matrix: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return matrix, numbers


_Views = list[tuple[Tensor, torch.Tensor]]


def _expansion_slot(model: Any, plan: Plan, device: torch.device) -> ExpansionSlot | None:
    """Memory for the weights of any block of `model`, which lies on the meta device, if its checkpoint is quantized.

    None where parts of experts are expanded beside their block.
    """
    if not expansions(model) or plan.expert_parts > 1:
        return None
    blocks = [block for _, layers in find_stacks(model) for block in layers]
    with torch.no_grad():
        return ExpansionSlot(max(expanded_bytes(expansions(block)) for block in blocks), device)


def _expand(group: TensorGroup, expanded: ExpandedGroup, piece: torch.Tensor) -> None:
    expanded.fill(piece)
    if group.entries is not None:
        _bind(expanded.views)


def _expanders(
    groups: Sequence[TensorGroup], device: torch.device, product: Product | None, passing: Container[str]
) -> dict[bool, Expander]:
    """An expanded slot for blocks, False, and one for parts of experts, True, if there are any. `passing`: weights
    that are in full for a product at a time."""
    kinds = {
        are_experts: [g for g in groups if (g.entries is not None) == are_experts] for are_experts in (False, True)
    }
    return {are_experts: Expander(own, device, product, passing) for are_experts, own in kinds.items() if own}


def _ready(views: _Views) -> _Views:
    return [(tensor, tensor.like(view)) for tensor, view in views]


def _bind(views: _Views) -> None:
    for tensor, view in views:
        tensor.bind(view)
