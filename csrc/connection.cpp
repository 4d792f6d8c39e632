#include "connection.h"

#include <algorithm>
#include <cstring>

namespace dora {

namespace {

// Small frames arrive many at a time; of a large payload only this much is copied.
constexpr std::size_t kStagingBytes = 16 * 1024;

// A reader that always finds more yields to the other sockets after so much.
constexpr std::size_t kFairBytes = 4 * 1024 * 1024;

// A reader of a large payload wakes up for so much: little enough to stay in the caches.
constexpr std::size_t kWakeBytes = 256 * 1024;

}  // namespace

Connection::Connection(Socket socket, Handshake handshake, double dead_s)
    : socket_(std::move(socket)),
      handshake_(std::move(handshake)),
      last_heard_s_(nowS()),
      staged_(kStagingBytes) {
  socket_.configure(dead_s);
}

void Connection::openSession(Protection protection) {
  protection_ = protection;
  session_.emplace(handshake_.session());
}

std::size_t Connection::payloadTagBytes() const {
  return protection_ >= Protection::kMac ? kTagBytes : 0;
}

std::uint8_t* Connection::scratch(std::vector<std::uint8_t>& memory, std::size_t size) {
  if (memory.size() < size) memory.resize(size);
  return memory.data();
}

// ------------------------------------------------------------ reading

void Connection::onReady(bool is_readable, bool is_writable) {
  if (is_writable) is_blocked_ = is_broken_;
  if (is_readable) {
    is_drained_ = false;
    if (!session_) {
      readHandshake();
    } else {
      readFrames();
      awaitPayload();
    }
  }
  flush();
}

void Connection::readHandshake() {
  while (!handshake_.done() && handshake_.needed() > 0) {
    std::uint8_t byte[512];
    std::size_t missing = handshake_.needed() - handshake_input_.size();
    Socket::Room room{byte, std::min(missing, sizeof byte)};
    std::size_t count = socket_.read(&room, 1);
    if (count == 0) return;
    last_heard_s_ = nowS();
    handshake_input_.append(reinterpret_cast<const char*>(byte), count);
    if (handshake_input_.size() < handshake_.needed()) continue;
    std::string message;
    message.swap(handshake_input_);
    try {
      handshake_.input(message.data(), message.size());
    } catch (const HandshakeError&) {
      sendHandshake();
      flush();
      throw;
    }
    sendHandshake();
  }
}

void Connection::readFrames() {
  std::size_t total = 0;
  while (total < kFairBytes || staged_begin_ < staged_end_) {
    std::size_t count;
    if (!receiving_) {
      count = readSome(header_ + header_size_, kHeaderBytes - header_size_);
      header_size_ += count;
      if (header_size_ == kHeaderBytes) finishHeader();
    } else if (payload_size_ < receiving_->length) {
      count = readSome(target_ + payload_size_, receiving_->length - payload_size_);
      if (protection_ == Protection::kChecksum) {  // piece by piece, while it is in the cache
        received_crc_ = crc32c(target_ + payload_size_, count, received_crc_);
      }
      payload_size_ += count;
      if (payload_size_ == receiving_->length && payloadTagBytes() == 0) finishPayload();
    } else {
      std::size_t tag_size = payload_size_ - receiving_->length;
      count = readSome(payload_tag_ + tag_size, payloadTagBytes() - tag_size);
      payload_size_ += count;
      if (tag_size + count == payloadTagBytes()) finishPayload();
    }
    if (count == 0) return;
    total += count;
  }
}

// The rest of a payload wakes the loop when it is there, not with each packet.
void Connection::awaitPayload() {
  std::size_t wanted = 1;
  if (is_drained_ && receiving_) {
    wanted = std::min(receiving_->length + payloadTagBytes() - payload_size_, kWakeBytes);
  }
  if (wanted != read_limit_) socket_.setReadLimit(read_limit_ = wanted);
}

// Reads into `into` from the staged bytes, or from the socket, which fills the stage as well.
std::size_t Connection::readSome(std::uint8_t* into, std::size_t size) {
  if (staged_begin_ < staged_end_) {
    std::size_t count = std::min(size, staged_end_ - staged_begin_);
    std::memcpy(into, staged_.data() + staged_begin_, count);
    staged_begin_ += count;
    return count;
  }
  if (is_drained_) return 0;
  Socket::Room rooms[2] = {{into, size}, {staged_.data(), staged_.size()}};
  std::size_t count = socket_.read(rooms, 2);
  if (count > 0) last_heard_s_ = nowS();
  // Less than asked for: the socket is empty, and the next event tells when it is not.
  is_drained_ = count < size + staged_.size();
  staged_begin_ = 0;
  staged_end_ = count > size ? count - size : 0;
  return std::min(count, size);
}

void Connection::finishHeader() {
  header_size_ = 0;
  if (!session_->receiving.openHeader(header_, header_ + kFieldBytes)) {
    throw ProtocolError("a header without a valid tag: altered, replayed or of another key");
  }
  FrameHeader header = decodeFields(header_);
  if (header.length == 0) {
    receiving_ = header;
    owner_->onHeader(*this, header);
    receiving_.reset();
    owner_->onFrame(*this, header, nullptr, true);
    return;
  }
  receiving_ = header;
  payload_size_ = 0;
  received_crc_ = 0;
  target_ = owner_->onHeader(*this, header);
  is_discarding_ = target_ == nullptr;
  if (is_discarding_) target_ = scratch(discarded_, header.length);
}

void Connection::finishPayload() {
  FrameHeader header = *receiving_;
  bool is_intact = true;
  if (protection_ == Protection::kChecksum) {
    is_intact = received_crc_ == header.crc;
  } else if (protection_ == Protection::kMac) {
    is_intact = session_->receiving.checkPayload(target_, header.length, payload_tag_);
  } else if (protection_ == Protection::kEncrypt) {
    is_intact =
        session_->receiving.decryptPayload(target_, header.length, target_, payload_tag_);
  }
  if (!is_intact && protection_ >= Protection::kMac) {
    throw ProtocolError("a payload without a valid tag: it was altered on the way");
  }
  receiving_.reset();
  owner_->onFrame(*this, header, target_, is_intact);
}

void Connection::detachTarget() {
  if (!receiving_ || is_discarding_ || receiving_->length == 0) return;
  std::uint8_t* own = scratch(discarded_, receiving_->length);
  std::memcpy(own, target_, std::min<std::size_t>(payload_size_, receiving_->length));
  target_ = own;
  is_discarding_ = true;
}

// ------------------------------------------------------------ writing

void Connection::appendHeader(const FrameHeader& header, std::string& to) {
  std::uint8_t bytes[kHeaderBytes];
  encodeFields(header, bytes);
  session_->sending.sealHeader(bytes, bytes + kFieldBytes);
  to.append(reinterpret_cast<const char*>(bytes), kHeaderBytes);
}

void Connection::sendControl(const FrameHeader& header, const std::string& payload) {
  std::string& to = payload_left_ > 0 ? after_ : before_;
  FrameHeader full = header;
  full.length = static_cast<std::uint32_t>(payload.size());
  full.crc = payload.empty() ? 0 : crc32c(payload.data(), payload.size());
  appendHeader(full, to);
  if (payload.empty()) return;
  std::string body = payload;
  std::uint8_t tag[kTagBytes];
  if (protection_ == Protection::kMac) {
    session_->sending.macPayload(body.data(), body.size(), tag);
  } else if (protection_ == Protection::kEncrypt) {
    session_->sending.encryptPayload(body.data(), body.size(), body.data(), tag);
  }
  to += body;
  to.append(reinterpret_cast<const char*>(tag), payloadTagBytes());
}

void Connection::startData(FrameHeader header, const void* data) {
  if (protection_ == Protection::kChecksum) header.crc = crc32c(data, header.length);
  appendHeader(header, before_);
  sending_ = header;
  payload_ = static_cast<const std::uint8_t*>(data);
  payload_left_ = header.length;
  if (header.length == 0 || payloadTagBytes() == 0) return;
  std::uint8_t tag[kTagBytes];
  if (protection_ == Protection::kMac) {
    session_->sending.macPayload(data, header.length, tag);
  } else {
    payload_ = scratch(own_payload_, header.length);
    session_->sending.encryptPayload(data, header.length, own_payload_.data(), tag);
  }
  after_.append(reinterpret_cast<const char*>(tag), kTagBytes);
}

void Connection::detachData() {
  bool is_own = payload_ >= own_payload_.data() &&
                payload_ < own_payload_.data() + own_payload_.size();
  if (payload_left_ == 0 || is_own) return;
  own_payload_.assign(payload_, payload_ + payload_left_);
  payload_ = own_payload_.data();
}

void Connection::endWriting() {
  if (is_ended_ || hasUnsent()) return;
  is_ended_ = true;
  socket_.endWriting();
}

void Connection::flush() {
  while (!is_blocked_ && !is_held_ && !is_ended_) {
    if (session_ && !sending_ && payload_left_ == 0 && after_.empty()) owner_->onRoom(*this);
    std::size_t first = before_.size() - before_sent_;
    bool is_payload_held = is_payload_held_ && payload_left_ > 0;
    std::size_t size = first + (is_payload_held ? 0 : payload_left_ + after_.size());
    if (size == 0) return;
    Socket::Piece pieces[3];
    int num_pieces = 0;
    if (first > 0) pieces[num_pieces++] = {before_.data() + before_sent_, first};
    if (payload_left_ > 0) pieces[num_pieces++] = {payload_, payload_left_};
    if (!after_.empty()) pieces[num_pieces++] = {after_.data(), after_.size()};
    if (is_payload_held) num_pieces = 1;
    std::size_t count = 0;
    try {
      count = socket_.write(pieces, num_pieces);
    } catch (const ConnectionLost&) {
      is_broken_ = true;
    }
    consume(count);
    is_blocked_ = count < size;
  }
}

void Connection::consume(std::size_t num_bytes) {
  std::size_t first = std::min(num_bytes, before_.size() - before_sent_);
  before_sent_ += first;
  num_bytes -= first;
  if (before_sent_ < before_.size()) return;
  before_.clear();
  before_sent_ = 0;
  std::size_t data = std::min(num_bytes, payload_left_);
  payload_ += data;
  payload_left_ -= data;
  num_bytes -= data;
  if (payload_left_ > 0) return;
  before_.swap(after_);
  before_sent_ = num_bytes;
  if (before_sent_ == before_.size()) {
    before_.clear();
    before_sent_ = 0;
  }
  if (sending_) {
    FrameHeader sent = *sending_;
    sending_.reset();
    payload_ = nullptr;
    owner_->onDataSent(*this, sent);
  }
}

}  // namespace dora
