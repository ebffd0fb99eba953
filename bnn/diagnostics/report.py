"""Report: findings, and how they print."""

import math
import shutil
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bnn import markup
from bnn.errors import ConvergenceWarning, outside


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at in a fit.

    Attributes:
        name: what it is, "R-hat of f".
        value: what was found.
        threshold: where it becomes doubtful; None for what has no limit.
        unlimited: why there is none, where there is none.
        doubtful: True where the answer should not be trusted without a second look.
        meaning: what it says, in a sentence.
        advice: what to do about it; of a finding with a limit, where it is doubtful.

    Raises:
        ValueError: it has no meaning or no advice; or a limit and a reason why there is none, or
            neither.

    Example:
        >>> finding = Finding(
        ...     name="R-hat of f",
        ...     value=1.2,
        ...     threshold=1.01,
        ...     doubtful=True,
        ...     meaning="Chains part.",
        ...     advice="Raise warmup.",
        ... )
        >>> finding.value > finding.threshold
        True
    """

    name: str
    value: float
    threshold: float | None
    doubtful: bool
    meaning: str
    advice: str
    unlimited: str = ""

    def __post_init__(self) -> None:
        if not self.meaning or not self.advice:
            raise ValueError(f'Finding "{self.name}" says what it means, and what to do.')
        if (self.threshold is None) != bool(self.unlimited):
            raise ValueError(
                f'Finding "{self.name}" has threshold={self.threshold!r} and '
                f"unlimited={self.unlimited!r}. Pass a threshold, or None and why there is none."
            )

    @property
    def limit(self) -> str:
        """The threshold as it prints, or why there is none."""
        return f"no limit: {self.unlimited}" if self.unlimited else f"limit {self.threshold:.4g}"

    @property
    def told(self) -> str:
        """What it means; and what to do, unless it is within its limit."""
        within = self.threshold is not None and not self.doubtful
        return self.meaning if within else f"{self.meaning} {self.advice}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was looked at in a fit, the doubtful first; `print` it.

    No doubtful finding is no proof: a mode that no chain has met leaves no trace in any of them.

    Attributes:
        title: the method and the number of draws.
        findings: what was found.
        missing: what one would expect and was not looked at: name -> why.

    Example:
        >>> finding = Finding(
        ...     name="R-hat of f",
        ...     value=1.2,
        ...     threshold=1.01,
        ...     doubtful=True,
        ...     meaning="Chains part.",
        ...     advice="Raise warmup.",
        ... )
        >>> Report(title="NUTS(): 4 chains x 100 draws", findings=(finding,))
        NUTS(): 4 chains x 100 draws
        1 doubtful of 1 findings
        <BLANKLINE>
        ! R-hat of f       1.2  limit 1.01
            Chains part. Raise warmup.
    """

    title: str
    findings: tuple[Finding, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def doubtful(self) -> list[Finding]:
        """The findings that should not be passed over."""
        return [each for each in self.findings if each.doubtful]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them: a number that is not finite is None."""
        plain = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
        findings = [{k: plain(v) for k, v in asdict(each).items()} for each in self._ordered()]
        return {"title": self.title, "findings": findings, "missing": dict(self.missing)}

    def _ordered(self) -> list[Finding]:
        return sorted(self.findings, key=lambda each: not each.doubtful)

    def _verdict(self) -> str:
        count = len(self.doubtful)
        return f"{count} doubtful of {len(self.findings)} findings" if count else (
            f"nothing doubtful in {len(self.findings)} findings"
        )  # fmt: skip

    def __repr__(self) -> str:
        width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 100))
        name = max([len(each.name) for each in self.findings], default=0)
        lines = [*textwrap.wrap(self.title, width), self._verdict(), ""]
        for each in self._ordered():
            head = f"{'!' if each.doubtful else ' '} {each.name:<{name}}  {each.value:>8.4g}  "
            lines += textwrap.wrap(head + each.limit, width, subsequent_indent=" " * len(head))
            indent = " " * 4
            lines += textwrap.wrap(
                each.told, width, initial_indent=indent, subsequent_indent=indent
            )
        if self.missing:
            lines += ["", "Not looked at"]
        for what, why in self.missing.items():
            lines += textwrap.wrap(f"{what}: {why}", width, subsequent_indent=" " * 4)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            (
                "doubtful" if each.doubtful else "",
                each.name,
                f"{each.value:.4g}",
                each.limit.removeprefix("limit "),
                each.meaning,
                each.advice,
            )
            for each in self._ordered()
        ]
        page = markup.paragraph(self.title, self._verdict())
        page += markup.table(("", "finding", "value", "limit", "meaning", "what to do"), rows)
        if self.missing:
            page += markup.paragraph("Not looked at")
            page += markup.items(f"{what}: {why}" for what, why in self.missing.items())
        return page


def warn(findings: Sequence[Finding]) -> None:
    """One warning for each doubtful finding, at the code that called the package."""
    for each in findings:
        if each.doubtful:
            warnings.warn(each.told, ConvergenceWarning, stacklevel=outside())
