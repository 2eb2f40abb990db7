"""What runs inside Redis: one Lua script for each write, so that comparing the fence and writing are one
step.

Knows keys, fences and byte strings; no client, no retry. Every script answers a list whose first item says
how it ended: ``ok`` and values, or ``missing`` (no such session), ``lost`` and the newest fence, ``epoch``
and the present one, and what a script adds to these.

A session's keys share the hash tag ``{id}``; KEYS[1] is always its hash:

    tenant sequence idempotency token   how it was made
    owner fence expires                 the lease; expires in milliseconds by this server's clock
    epoch                               rises when a client gives up a write whose answer it never got: should
    that
                                        write still be on its way, it is refused when it arrives
    journal_bytes
"""

from __future__ import annotations

_WRITING = """
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence', 'epoch')
if not held[2] then return {'missing'} end
if held[1] == '' or held[2] ~= ARGV[1] then return {'lost', held[2]} end
if held[3] ~= ARGV[2] then return {'epoch', held[3]} end
"""
"""ARGV: fence, epoch."""

CREATE = """
local token = redis.call('HGET', KEYS[1], 'token')
if token == ARGV[1] then return {'ok'} end
if token then return {'exists'} end
if ARGV[5] ~= '' and redis.call('EXISTS', KEYS[5]) == 1 then return {'repeat'} end
local sequence = redis.call('INCR', KEYS[4])
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'tenant', ARGV[3], 'sequence', sequence, 'idempotency', ARGV[5],
    'owner', '', 'fence', 0, 'expires', 0, 'epoch', 0, 'journal_bytes', #ARGV[4])
redis.call('RPUSH', KEYS[2], ARGV[4])
redis.call('ZADD', KEYS[3], sequence, ARGV[2])
if ARGV[5] ~= '' then
    redis.call('HSET', KEYS[5], 'session', ARGV[2], 'value', ARGV[6])
    redis.call('EXPIRE', KEYS[5], ARGV[7])
end
return {'ok'}
"""
"""KEYS: session, journal, tenant, sequence, idempotency. ARGV: token of the call, id, tenant's hash, first
record, key's hash or nothing, value, seconds. A repeat of the same call is answered as the first was."""

ACQUIRE = """
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence', 'expires')
if not held[2] then return {'missing'} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local fence = held[2]
if held[1] ~= ARGV[1] then
    if held[1] ~= '' and tonumber(held[3]) > now then
        return {'busy', string.format('%.0f', tonumber(held[3]) - now)}
    end
    fence = string.format('%.0f', tonumber(fence) + 1)
end
local expires = string.format('%.0f', now + tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'fence', fence, 'expires', expires)
return {'ok', fence, expires}
"""
"""ARGV: owner, milliseconds."""

RELEASE = """
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if held[1] == ARGV[1] and held[2] == ARGV[2] then redis.call('HSET', KEYS[1], 'owner', '') end
return {'ok'}
"""
"""ARGV: owner, fence."""

GIVE_UP = (
    _WRITING
    + """
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
if ARGV[3] ~= '' then
    local last = redis.call('LINDEX', KEYS[2], -1)
    while last and string.sub(last, 1, #ARGV[3]) == ARGV[3] do
        redis.call('RPOP', KEYS[2])
        redis.call('HINCRBY', KEYS[1], 'journal_bytes', -#last)
        last = redis.call('LINDEX', KEYS[2], -1)
    end
end
if ARGV[4] ~= '' and tonumber(redis.call('HGET', KEYS[3], ARGV[4]) or '0') > tonumber(ARGV[5]) then
    redis.call('HSET', KEYS[3], ARGV[4], ARGV[5])
end
return {'ok'}
"""
)
"""KEYS: session, journal, spools. ARGV: ..., token of an append or nothing, document or nothing, its length
before. Undoes a write that may have landed though its answer was lost, and keeps it out if it is still on its
way. Under a newer fence it stays: the new owner has read it."""

APPEND = (
    _WRITING
    + """
local nbytes = 0
for i = 3, #ARGV do
    redis.call('RPUSH', KEYS[2], ARGV[i])
    nbytes = nbytes + #ARGV[i]
end
redis.call('HINCRBY', KEYS[1], 'journal_bytes', nbytes)
return {'ok', redis.call('LLEN', KEYS[2])}
"""
)
"""KEYS: session, journal. ARGV: ..., records."""

SPOOL = (
    _WRITING
    + """
local length = tonumber(redis.call('HGET', KEYS[2], ARGV[3]) or '0')
if length ~= tonumber(ARGV[4]) then return {'offset', length} end
if ARGV[6] ~= '' then
    redis.call('SADD', KEYS[3], KEYS[4])
    redis.call('SETRANGE', KEYS[4], ARGV[5], ARGV[6])
end
if ARGV[7] ~= '' then redis.call('HSET', KEYS[2], ARGV[3], ARGV[7]) end
return {'ok', length}
"""
)
"""KEYS: session, spools, pieces, piece. ARGV: ..., document, its length, offset in the piece, bytes, length
afterwards or nothing: bytes past the length can't be seen, so a write of many pieces counts with its last."""

PIECE = (
    _WRITING
    + """
redis.call('SADD', KEYS[2], KEYS[3])
redis.call('SET', KEYS[3], ARGV[3], 'EX', ARGV[4])
return {'ok'}
"""
)
"""KEYS: session, pieces, piece. ARGV: ..., bytes, seconds that it lasts unless it is pointed to."""

_DROP_SNAPSHOT = """
local function drop(version, base)
    local old = redis.call('HGET', KEYS[2], version)
    if not old then return end
    local token, count = string.match(old, '^(%x+) (%d+) ')
    for i = 0, tonumber(count) - 1 do
        local piece = base .. ':' .. version .. ':' .. token .. ':' .. i
        redis.call('UNLINK', piece)
        redis.call('SREM', KEYS[3], piece)
    end
    redis.call('HDEL', KEYS[2], version)
end
"""

POINT = (
    _WRITING
    + _DROP_SNAPSHOT
    + """
for i = 4, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then return {'gone'} end
end
for i = 4, #KEYS do redis.call('PERSIST', KEYS[i]) end
if redis.call('HGET', KEYS[2], ARGV[3]) ~= ARGV[4] then drop(ARGV[3], ARGV[5]) end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
return {'ok'}
"""
)
"""KEYS: session, snapshots, pieces, the new pieces. ARGV: ..., version, pointer, start of pieces' names."""

DELETE_SNAPSHOT = (
    _WRITING
    + _DROP_SNAPSHOT
    + """
drop(ARGV[3], ARGV[4])
return {'ok'}
"""
)
"""KEYS: session, snapshots, pieces. ARGV: ..., version, start of pieces' names."""

DELETE_SPOOL = (
    _WRITING
    + """
redis.call('HDEL', KEYS[2], ARGV[3])
for i = 4, #KEYS do
    redis.call('UNLINK', KEYS[i])
    redis.call('SREM', KEYS[3], KEYS[i])
end
return {'ok'}
"""
)
"""KEYS: session, spools, pieces, the document's pieces. ARGV: ..., document."""

ERASE = (
    _WRITING
    + """
for _, piece in ipairs(redis.call('SMEMBERS', KEYS[5])) do redis.call('UNLINK', piece) end
redis.call('ZREM', KEYS[6], ARGV[3])
if redis.call('HGET', KEYS[7], 'session') == ARGV[3] then redis.call('DEL', KEYS[7]) end
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
return {'ok'}
"""
)
"""KEYS: session, journal, snapshots, spools, pieces, tenant, idempotency. ARGV: ..., id."""
