"""What a source's chunks say, put together."""

import json


def objects(source, limit=None):
    found = (o for chunk in source.chunks(None, limit) for o in chunk.objects())
    return [json.loads(o) if isinstance(o, str) else o for o in found]


def batches(source, schema, limit=None):
    return [chunk.arrow(schema) for chunk in source.chunks(schema.names, limit)]
