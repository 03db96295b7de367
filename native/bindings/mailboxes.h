// The mailboxes of micro-batches, as `lamina.transport.topology.StepMailboxes` has them.
#pragma once

#include <array>
#include <vector>

#include "worker/executor_end.h"

namespace lamina {

/// Numbers of q, kv, out and report, then their capacities in bytes.
using MailboxNumbers = std::array<size_t, 8>;

inline std::vector<StepMailboxes> step_mailboxes(const std::vector<MailboxNumbers>& micro_batches) {
  std::vector<StepMailboxes> mailboxes;
  for (const auto& [q, kv, out, report, q_bytes, kv_bytes, out_bytes, report_bytes] :
       micro_batches) {
    mailboxes.push_back({static_cast<uint16_t>(q), static_cast<uint16_t>(kv),
                         static_cast<uint16_t>(out), static_cast<uint16_t>(report), q_bytes,
                         kv_bytes, out_bytes, report_bytes});
  }
  return mailboxes;
}

}  // namespace lamina
