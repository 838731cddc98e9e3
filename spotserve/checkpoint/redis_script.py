"""The rules of commit as a script that runs inside Redis, beside the data (see `store.ProgressStore`, and `rules` in Python).

KEYS: one per commit. ARGV: time to live in milliseconds; the commits, packed by `codec.pack_row`. Answers three numbers per
commit: the index of the verdict (OK, GAP, FENCED), tokens stored, epoch stored.
"""

import hashlib

COMMIT = """
local answer = {}
local commits, offset = ARGV[2], 1
for _, key in ipairs(KEYS) do
  local epoch, position, finish, num_bytes, first = struct.unpack('<I8I8BI4', commits, offset)
  offset = first + num_bytes
  local stored_epoch, stored_finish, length = 0, 0, 0
  local header = redis.call('GETRANGE', key, 0, 8)
  if #header == 9 then
    stored_epoch, stored_finish = struct.unpack('<I8B', header)
    length = (redis.call('STRLEN', key) - 9) / 4
  end
  local verdict = 0
  if stored_epoch > epoch then
    verdict = 2
  elseif position > length then
    verdict = 1
  else
    if finish == 0 then finish = stored_finish end
    local tail = string.sub(commits, first + (length - position) * 4, offset - 1)
    local new_header = struct.pack('<I8B', epoch, finish)
    if #header ~= 9 then
      redis.call('SET', key, new_header .. tail)
    else
      if new_header ~= header then redis.call('SETRANGE', key, 0, new_header) end
      if #tail > 0 then redis.call('APPEND', key, tail) end
    end
    redis.call('PEXPIRE', key, ARGV[1])
    stored_epoch = epoch
    length = length + #tail / 4
  end
  answer[#answer + 1] = verdict
  answer[#answer + 1] = length
  answer[#answer + 1] = stored_epoch
end
return answer
"""

COMMIT_SHA1 = hashlib.sha1(COMMIT.encode(), usedforsecurity=False).hexdigest()
"""The name under which Redis remembers the script."""
