"""InfoNCE on Triton: the order of the work, in panels.

Shapes: N own queries, M gathered targets, P gathered queries, H own negatives, D width; R rows of
a panel, C columns of a block of negatives, T column tiles of all blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coma_ds.kernels.dispatch import interpreted
from coma_ds.kernels.info_nce import launch
from coma_ds.kernels.info_nce.inputs import Problem
from coma_ds.kernels.info_nce.launch import Block, Settings, Sums
from coma_ds.kernels.info_nce.plan import SHARE, Plan, make_plan
from coma_ds.kernels.info_nce.tiles import choose_tile

LOG2E = math.log2(math.e)
NO_IDS = (None, None)
Totals = dict[str, torch.Tensor]


def _part(x: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if x is None else x[part]


@dataclass(frozen=True)
class Wanted:
    """Which gradients; that of the temperature is one more sum of the terms."""

    query: bool = False
    target: bool = False
    temperature: bool = False
    own: bool = False
    query_all: bool = False

    @property
    def terms(self) -> bool:
        """Whether the terms themselves are needed, not their sums alone."""
        return self.query or self.target or self.query_all


class Run:
    """One pass over a problem.

    Results, float32: ``losses`` [N]; ``heat`` [N], the gradient of each row's temperature;
    ``query_grad``, ``target_grad``, ``own_grad``, ``all_grad`` where wanted; ``positive``,
    ``hardest``, ``masked`` [N] for monitoring (the last two with ``statistics``).  In gradients a
    row's loss counts ``factor`` times, or ``weight_N`` times.  ``plan`` replaces the computed one.
    """

    def __init__(
        self,
        p: Problem,
        wanted: Wanted,
        *,
        operand_dtype: torch.dtype | None = None,
        factor: float = 1.0,
        weight_N: torch.Tensor | None = None,
        statistics: bool = False,
        share: float = SHARE,
        plan: Plan | None = None,
    ) -> None:
        self.p, self.wanted, self.factor, self.statistics = p, wanted, factor, statistics
        self.weight_N = None if weight_N is None else weight_N.float().contiguous()
        self.device = p.query_ND.device
        processors, capability = 132, 9
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            processors, capability = card.multi_processor_count, card.major
        self.dtype = operand_dtype or p.query_ND.dtype
        # terms need the exponents of bfloat16: float16 operands are multiplied as bfloat16 there
        self.term_dtype = torch.float32 if self.dtype == torch.float32 else torch.bfloat16
        self.query, self.target, self.own, self.query_all = (
            launch.operand(x, self.dtype)
            for x in (p.query_ND, p.target_MD, p.own_negative_NHD, p.query_all_PD)
        )
        self.index = p.positive_N.contiguous()
        self.temperature = p.temperature.detach().float().contiguous()
        self.settings = Settings(
            hardness=p.hardness * LOG2E,
            margin=p.margin,
            temperatures=len(self.temperature),
            own=0 if self.own is None else self.own.shape[1],
            width=self.query.shape[1],
            processors=processors,
            capability=capability,
            interpreted=interpreted(),
        )
        self._make_vectors()
        self._make_gradients()
        self.blocks = self._blocks()
        self.plan = plan or self._plan(share)
        columns = self.plan.columns or sum(len(block.columns) for block in self.blocks)
        tall = min(self.plan.rows, p.rows)
        plain = p.false_negatives is None and p.margin is None and not p.hardness
        plain = plain and not statistics and not wanted.temperature
        self.tile = choose_tile(
            "terms" if plain else "terms with options",
            tall,
            columns,
            self.dtype,
            self.settings,
        )
        self._cosines()
        if self.plan.columns is None:
            self._row_panels()
        else:
            self._column_panels()

    def _numbers(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _aligned(self, height: int, width: int) -> torch.Tensor:
        return launch.aligned(height, width, self.term_dtype, self.device)

    def _make_vectors(self) -> None:
        n, own = self.p.rows, self.settings.own
        names = ("losses", "heat", "positive", "scale", "reference", "push", "pull")
        self.vectors = dict(zip(names, self._numbers(len(names), n)))
        self.losses, self.heat = self.vectors["losses"], self.vectors["heat"]
        self.positive = self.vectors["positive"]
        self.scores = self._numbers(n, own) if own else None
        self.own_push = self._numbers(n, own) if own else None
        self.hardest = self._numbers(n) if self.statistics else None
        self.masked = self._numbers(n) if self.statistics else None

    def _make_gradients(self) -> None:
        def like(x: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
            return self._numbers(*x.shape) if wanted else None

        self.query_grad = like(self.query, self.wanted.query)
        self.target_grad = like(self.target, self.wanted.target)
        self.own_grad = like(self.own, self.wanted.own)
        self.all_grad = like(self.query_all, self.wanted.query_all)
        self.written: set[int] = set()  # gradients of columns that are more than empty memory

    def _blocks(self) -> list[Block]:
        p, ids = self.p, self.p.false_negatives
        answers, asked, other_answers, other_asked = (NO_IDS,) * 4
        if ids is not None:
            contents_M = ids.target_ids_M.contiguous()
            answer_N = launch.contents_of(contents_M, self.index)
            answers = (answer_N, contents_M)
            if ids.query_ids_N is not None:
                asked = (ids.query_ids_N.contiguous(), ids.target_query_ids_M.contiguous())
            if ids.query_ids_N is not None and ids.query_all_ids_P is not None:
                other_asked = (asked[0], ids.query_all_ids_P.contiguous())
            if ids.query_all_target_ids_P is not None:
                other_answers = (answer_N, ids.query_all_target_ids_P.contiguous())
        shared = (
            self.target,
            launch.operand(self.target, self.term_dtype),
            self.index,
            (answers, asked),
        )
        blocks = [Block("q-t", *shared, self.target_grad)]
        if p.target_to_target:
            blocks.append(Block("t-t", *shared, self.target_grad))
        if self.query_all is not None:
            multiplied, place = (
                launch.operand(self.query_all, self.term_dtype),
                p.query_index_N.contiguous(),
            )
            pairs = (other_answers, other_asked)
            blocks.append(Block("q-q", self.query_all, multiplied, place, pairs, self.all_grad))
        return blocks

    def _plan(self, share: float) -> Plan:
        item = self.term_dtype.itemsize
        buffers = (item + self.dtype.itemsize + 4) * self.p.target_to_target
        buffers += 4 * (self.query_all is not None)
        return make_plan(
            self.p.rows,
            sum(len(block.columns) for block in self.blocks),
            self.settings.width,
            item=item,
            buffers=buffers,
            processors=self.settings.processors,
            share=share,
        )

    def _row_panels(self) -> None:
        """Panels of rows and all columns: terms once, gradients of columns once a panel."""
        n, tall = self.p.rows, self.plan.rows
        if self.wanted.terms:
            for block in self.blocks:
                block.panel = self._aligned(min(tall, n), len(block.columns))
        for start in range(0, n, tall):
            part = slice(start, min(n, start + tall))
            height = part.stop - start
            self._sum_terms(part)
            totals = self._totals(part)
            for block in self.blocks:
                if block.kind in totals:
                    launch.multiply(block.panel[:height], block.multiplied, totals[block.kind])
            scaled = self._spread(part, totals, scale=True, last=True)
            for block in self.blocks:
                if block.grad is not None:
                    add = id(block.grad) in self.written
                    rows_RD = scaled[block.from_target]
                    self._accumulate(block.panel[:height], rows_RD, block.grad, True, add)
                    self.written.add(id(block.grad))
            self._collect(part, totals)

    def _column_panels(self) -> None:
        """All rows: sums first; then panels of columns, the gradient of each column once."""
        part = slice(0, self.p.rows)
        self._sum_terms(part)
        totals = self._totals(part)
        scaled = self._spread(part, totals, scale=True, last=False)
        if self.wanted.terms:
            for block in self.blocks:
                self._columns_of(block, totals.get(block.kind), scaled[block.from_target])
        self._spread(part, totals, scale=False, last=True)
        self._collect(part, totals)

    def _columns_of(
        self, block: Block, total: torch.Tensor | None, scaled: torch.Tensor | None
    ) -> None:
        part, n = slice(0, self.p.rows), self.p.rows
        row_RD = self._row_operand(part, block)
        add = block.grad is not None and id(block.grad) in self.written
        for start in range(0, len(block.columns), self.plan.columns):
            columns = slice(start, min(len(block.columns), start + self.plan.columns))
            panel = self._aligned(n, columns.stop - start)
            again = self._sums(-(-(columns.stop - start) // self.tile.columns), n)
            self._terms(block, row_RD, part, again, columns, 0, panel, gated=False)
            if total is not None:
                self._accumulate(panel, block.multiplied[columns], total, False, start > 0)
            if block.grad is not None:
                self._accumulate(panel, scaled, block.grad[columns], True, add)
        if block.grad is not None:
            self.written.add(id(block.grad))

    def _row_operand(self, part: slice, block: Block) -> torch.Tensor:
        if not block.from_target:
            return self.query[part]
        place_R = self.index[part].clamp(0, len(self.target) - 1)
        return launch.operand(self.target[place_R], self.dtype)

    def _sums(self, tiles: int, height: int) -> Sums:
        slopes = self.wanted.temperature
        return Sums.make(
            tiles, height, self.tile, self.device, slopes=slopes, drops=self.statistics
        )

    def _sum_terms(self, part: slice) -> None:
        """Terms of all blocks, kept where there are panels; then losses and factors of rows.

        The second launch of a block does nothing unless a term of a row tile was above the limit.
        """
        counts = [-(-len(block.columns) // self.tile.columns) for block in self.blocks]
        height = part.stop - part.start
        sums = self._sums(sum(counts), height)
        operands = [self._row_operand(part, block) for block in self.blocks]
        for gated in (False, True):
            first = 0
            for block, row_RD, count in zip(self.blocks, operands, counts):
                panel = None if block.panel is None else block.panel[:height]
                whole = slice(0, len(block.columns))
                self._terms(block, row_RD, part, sums, whole, first, panel, gated=gated)
                first += count
        self._finish(part, sums, counts[0])

    def _totals(self, part: slice) -> Totals:
        """Room for sum of term * column [R, D] of each block, where somebody wants it."""
        totals = {}
        for block in self.blocks:
            if (self.target_grad if block.from_target else self.query_grad) is None:
                continue
            size = (part.stop - part.start, self.settings.width)
            first = block.kind == "q-t"
            totals[block.kind] = self.query_grad[part] if first else self._numbers(*size)
        return totals

    def _terms(self, block, row_RD, part, sums, columns, first_tile, panel, *, gated) -> None:
        launch.terms(
            block,
            row_RD,
            part,
            self.vectors,
            sums,
            self.settings,
            self.tile,
            columns=columns,
            first_tile=first_tile,
            gated=gated,
            panel=panel,
        )

    def _accumulate(self, panel, row_KD, out_MD, transposed: bool, add: bool) -> None:
        launch.accumulate(panel, row_KD, out_MD, self.settings, transposed=transposed, add=add)

    def _cosines(self) -> None:
        launch.cosines(
            self.p,
            (self.query, self.target, self.own),
            self.index,
            self.temperature,
            self.vectors,
            self.scores,
            self.settings,
        )

    def _finish(self, part: slice, sums: Sums, target_tiles: int) -> None:
        vectors = {name: vector[part] for name, vector in self.vectors.items()}
        per_row = self.settings.temperatures > 1
        launch.finish(
            sums,
            vectors,
            self.temperature[part] if per_row else self.temperature,
            self.factor if self.weight_N is None else self.weight_N[part],
            *(_part(x, part) for x in (self.scores, self.own_push, self.hardest, self.masked)),
            target_tiles,
            self.settings,
        )

    def _spread(self, part: slice, totals: Totals, *, scale: bool, last: bool) -> dict:
        """Scale the rows that the gradients of columns are made of ([R, D] by ``from_target``);
        with ``last``, turn the totals into what the rows and their positives get."""
        scaled: dict[bool, torch.Tensor | None] = {False: None, True: None}
        for block in self.blocks if scale else ():
            if block.grad is not None and scaled[block.from_target] is None:
                size = (part.stop - part.start, self.settings.width)
                scaled[block.from_target] = self._aligned(*size)
        launch.spread(
            (self.query[part], self.target, _part(self.own, part)),
            self.index[part],
            {name: vector[part] for name, vector in self.vectors.items()},
            _part(self.own_push, part),
            (totals.get("q-t"), totals.get("q-q"), totals.get("t-t")) if last else (None,) * 3,
            scaled,
            _part(self.own_grad, part) if last else None,
            self.settings,
        )
        return scaled

    def _collect(self, part: slice, totals: Totals) -> None:
        if self.target_grad is not None:
            launch.collect(
                self.index[part],
                self.p.distinct,
                self.query[part],
                self.vectors["pull"][part],
                totals.get("t-t"),
                self.target_grad,
                self.settings,
            )
