"""The endpoint on loopback, over http: what unmodified fal_client, @fal-ai/client and browsers talk to.

`app` has the routes, `guard` decides who may use them, `files` keeps uploads and gives out
videos, `process` runs it all.
"""
