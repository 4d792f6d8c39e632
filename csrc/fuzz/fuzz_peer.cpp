// Feeds arbitrary frames, as an authenticated but hostile peer could, to both directions of a peer,
// between posts and cancellations of this rank. What is stored must stay within the eager credit.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "inbox.h"
#include "outbox.h"

using namespace dora;

namespace {

constexpr std::uint64_t kCredit = 64 * 1024;

// Takes small numbers from the input; zeros when it has run out.
struct Source {
  const std::uint8_t* data;
  std::size_t size;

  std::uint8_t byte() {
    if (size == 0) return 0;
    --size;
    return *data++;
  }
  std::uint64_t number(std::uint64_t limit) { return (byte() | byte() << 8) % limit; }
};

FrameHeader frame(Source& source) {
  FrameHeader header;
  header.type = static_cast<FrameType>(1 + source.byte() % kLastFrameType);
  header.traffic_class = source.byte() % kNumClasses;
  header.flags = source.byte() & kAllFlags;
  header.tag = static_cast<std::int32_t>(source.byte() % 4) - 1;
  header.seq = source.byte() % 4;
  header.total = source.number(3000);
  header.offset = source.number(header.total + 1);
  header.length = static_cast<std::uint32_t>(source.number(header.total - header.offset + 1));
  return header;
}

struct Rank {
  EngineOptions options;
  Lanes lanes;
  std::unique_ptr<Inbox> inbox;
  std::unique_ptr<Outbox> outbox;
  std::vector<TransferPtr> transfers;
  std::vector<std::vector<std::uint8_t>> memory;  // freed as soon as its operation is over

  Rank() {
    options.eager_bytes = 1000;
    options.eager_credit_bytes = kCredit;
    lanes.drop();  // nobody listens
    inbox = std::make_unique<Inbox>(options, lanes);
    outbox = std::make_unique<Outbox>(options, lanes);
  }

  void post(Source& source) {
    auto transfer = std::make_shared<Transfer>(transfers.size() + 1);
    transfer->is_send = source.byte() % 2 == 0;
    transfer->peer = 1;
    transfer->key.tag = source.byte() % 3;
    transfer->priority = {static_cast<std::uint8_t>(source.byte() % kNumClasses), 0};
    transfer->num_bytes = source.number(3000);
    memory.emplace_back(transfer->num_bytes);
    transfer->data = memory.back().data();
    transfers.push_back(transfer);
    if (transfer->is_send) {
      outbox->post(transfer, 0);
    } else {
      inbox->post(transfer);
    }
  }

  void cancel(Source& source) {
    if (transfers.empty()) return;
    std::size_t i = source.number(transfers.size());
    if (transfers[i]->isDone()) return;
    if (transfers[i]->is_send) {
      outbox->cancel(*transfers[i], Outcome::kCancelled, "");
    } else {
      inbox->cancel(*transfers[i], Outcome::kCancelled, "");
    }
    if (!transfers[i]->isDone()) std::abort();
    std::vector<std::uint8_t>().swap(memory[i]);
  }

  void data(const FrameHeader& header, bool is_intact) {
    std::vector<std::uint8_t> scratch(header.length, 7);
    std::uint8_t* target = inbox->onHeader(header);
    if (target && header.length > 0) std::memset(target, 7, header.length);
    inbox->onData(header, target ? target : scratch.data(), is_intact);
  }

  void receive(Source& source) {
    FrameHeader header = frame(source);
    switch (header.type) {
      case FrameType::kData: data(header, source.byte() % 8 != 0); break;
      case FrameType::kRequest: inbox->onRequest(header); break;
      case FrameType::kGrant: outbox->onGrant(header); break;
      case FrameType::kCredit: outbox->onCredit(header); break;
      case FrameType::kAck: outbox->onAck(header, 0); break;
      case FrameType::kCancel:
        if (header.flags & kFlagToSender) {
          outbox->onCancel(header, "why");
        } else {
          inbox->onCancel(header, "why");
        }
        break;
      default: break;
    }
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Source source{data, size};
  Rank rank;
  while (source.size > 0) {
    try {
      std::uint8_t what = source.byte() % 8;
      if (what == 0) {
        rank.post(source);
      } else if (what == 1) {
        rank.cancel(source);
      } else {
        rank.receive(source);
      }
    } catch (const ProtocolError&) {
      break;  // the engine drops the peer
    }
    if (rank.inbox->unexpectedBytes() > kCredit) std::abort();
  }
  rank.inbox->failAll(Outcome::kPeerLost, "");
  rank.outbox->failAll(Outcome::kPeerLost, "");
  for (const auto& transfer : rank.transfers) {
    if (!transfer->isDone()) std::abort();
  }
  return 0;
}
