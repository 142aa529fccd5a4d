"""Embed images to Parquet, and search them with SQL in DuckDB (pip install duckdb).

python examples/duckdb_search.py BACKBONE IMAGES OUT QUERY
"""

import sys

import duckdb

import troodon

backbone = troodon.load(sys.argv[1])
folder = troodon.embed(backbone, sys.argv[2], sys.argv[3], format="parquet")  # done once: the next time it is there
query = backbone.features(sys.argv[4]).cls[0].tolist()
found = duckdb.execute(
    """SELECT path, label, list_cosine_similarity(embedding, $query::FLOAT[]) AS score
    FROM read_parquet($file) ORDER BY score DESC LIMIT 5""",
    {"query": query, "file": f"{folder}/embeddings.parquet"},
).fetchall()
for path, label, score in found:
    print(f"{score:.3f}  {label}  {path}")
