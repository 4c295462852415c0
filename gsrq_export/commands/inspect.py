"""gsrq inspect: what an artifact is and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from gsrq_export.artifact.manifest import load_manifest
from gsrq_export.commands.options import artifact_option
from gsrq_export.report.schema import BuildMetrics


@click.command()
@artifact_option
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
def inspect(artifact: Path, as_json: bool) -> None:
    """Show an artifact's provenance, bits, bytes and measured loss."""
    manifest = load_manifest(artifact)
    metrics = BuildMetrics.load(artifact / "metrics.json")
    if as_json:
        data = {"manifest": manifest.model_dump(mode="json", by_alias=True), "metrics": asdict(metrics)}
        click.echo(json.dumps(data, indent=1))
        return
    cache, layer = manifest.cache, manifest.layers[0]
    click.echo(
        f"{manifest.name}: schema {manifest.schema_version}, {manifest.created_by}, operator {manifest.op_version}, "
        f"opset {manifest.opset}\n"
        f"model      {manifest.model.id}, weights {manifest.model.weights_sha256[:16]}\n"
        f"traffic    {manifest.traffic.sequences} x {manifest.traffic.sequence_length} tokens, "
        f"{manifest.traffic.sha256[:16]}\n"
        f"layers     {len(manifest.layers)}, {layer.num_kv_heads} KV heads of {layer.head_dim}; "
        f"keys D={layer.keys.width} R={layer.keys.stages}, values D={layer.values.width} R={layer.values.stages}\n"
        f"cache      {cache.sinks} sinks, window {cache.window}, blocks of {cache.block}, {cache.exact_dtype}, "
        f"prefill {cache.prefill}, beam {cache.beam}, key frame {cache.key_frame}, "
        f"codes ordered by {cache.code_order}\n"
        f"bits       {metrics.nominal_bits:g} nominal; effective for one sequence, all counted:"
    )
    for size in metrics.sizes:
        click.echo(
            f"           {size.context_tokens:>7} tokens: {size.effective_bits:6.2f} bits; cache "
            f"{size.code_bytes + size.exact_bytes:,} bytes, 16-bit {size.plain_bytes:,}"
        )
    ends = [d.relative_mse_by_stage[-1] for d in metrics.distortion]
    click.echo(
        f"distortion {sum(ends) / len(ends):.4f} mean of held-out keys and values, {max(ends):.4f} worst codebook"
    )
    if metrics.exact and metrics.coded and metrics.comparison:
        exact, coded = metrics.exact["perplexity"], metrics.coded["perplexity"]
        click.echo(f"perplexity {exact['perplexity']:.3f} exact, {coded['perplexity']:.3f} coded")
        for row in metrics.comparison["recall"]:
            click.echo(f"recall     {row['exact']:.2f} exact, {row['coded']:.2f} coded at {row['tokens']} tokens")
