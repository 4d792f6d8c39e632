// One TCP connection: authenticates, then carries frames both ways, payloads without a copy.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "frame.h"
#include "handshake.h"
#include "reactor.h"

namespace dora {

class Connection;

// What a connection tells its owner. Calls come from inside `onReady` and `flush`.
class ConnectionOwner {
 public:
  virtual ~ConnectionOwner() = default;
  // A header has arrived: returns `header.length` bytes of memory for its payload, or null to
  // read it into the void.
  virtual std::uint8_t* onHeader(Connection& connection, const FrameHeader& header) = 0;
  // A frame is complete. `is_intact`: its payload matches its checksum. `payload` is what
  // onHeader returned, or the connection's own memory.
  virtual void onFrame(Connection& connection, const FrameHeader& header,
                       const std::uint8_t* payload, bool is_intact) = 0;
  // There is room for a data frame: may call `startData` once.
  virtual void onRoom(Connection& connection) = 0;
  // The payload of the last `startData` is in the kernel's hands.
  virtual void onDataSent(Connection& connection, const FrameHeader& header) = 0;
};

// Frames over one socket.
//
// Writing: control frames are queued by `sendControl`; between them the owner is asked for one
// data frame at a time, so that what is most urgent is decided as late as possible.
// Thread safety: none; whoever holds the engine's state.
class Connection {
 public:
  Connection(Socket socket, Handshake handshake, double dead_s);

  Socket& socket() { return socket_; }
  Handshake& handshake() { return handshake_; }

  // True once both sides have authenticated; from then on frames flow.
  bool isOpen() const { return session_.has_value(); }
  const Session& session() const { return *session_; }

  // Both sides have authenticated: takes the keys. Frames flow once there is an owner.
  void openSession(Protection protection);
  void setOwner(ConnectionOwner& owner) { owner_ = &owner; }

  // Reads what is there and writes what fits. Throws ConnectionLost, HandshakeError and
  // ProtocolError; the connection is then of no more use.
  void onReady(bool is_readable, bool is_writable);

  // Queues what the handshake wants to say: of the caller when connected, or after a refusal.
  void sendHandshake() { before_ += handshake_.output(); }

  // Writes what fits; call after queueing. A broken connection shows when it is read to its end,
  // since the peer's last words may still be in it.
  void flush();
  // Nothing is written while held; of a held payload, neither it nor what comes after.
  void hold(bool is_held) { is_held_ = is_held; }
  void holdPayload(bool is_held) { is_payload_held_ = is_held; }
  // Something waits for room in the socket.
  bool wantsWrite() const { return is_blocked_ && !is_broken_; }
  bool isBlocked() const { return is_blocked_; }
  bool hasUnsent() const { return !before_.empty() || payload_left_ > 0 || !after_.empty(); }

  void sendControl(const FrameHeader& header, const std::string& payload = "");
  // Once all is written: nothing more will be, and the peer reads an end.
  void endWriting();

  // Only from `onRoom`. `data` stays valid until `onDataSent` or `detachData`.
  void startData(FrameHeader header, const void* data);
  // The payload of the data frame under way moves to own memory, so that its owner may free it.
  void detachData();
  // The payload being received goes to the void from here on.
  void detachTarget();
  // The frame whose payload is being received.
  const std::optional<FrameHeader>& receiving() const { return receiving_; }
  const std::optional<FrameHeader>& sending() const { return sending_; }

  double lastHeardS() const { return last_heard_s_; }

 private:
  void readHandshake();
  void readFrames();
  void awaitPayload();
  std::size_t readSome(std::uint8_t* into, std::size_t size);
  void finishHeader();
  void finishPayload();
  void appendHeader(const FrameHeader& header, std::string& to);
  std::uint8_t* scratch(std::vector<std::uint8_t>& memory, std::size_t size);
  std::size_t payloadTagBytes() const;
  void consume(std::size_t num_bytes);

  Socket socket_;
  Handshake handshake_;
  std::optional<Session> session_;
  ConnectionOwner* owner_ = nullptr;
  Protection protection_ = Protection::kChecksum;
  double last_heard_s_;

  // Reading: staged bytes first, then the socket; `header_` fills up, then `target_`.
  std::vector<std::uint8_t> staged_;
  std::size_t staged_begin_ = 0, staged_end_ = 0;
  bool is_drained_ = false;
  std::size_t read_limit_ = 1;
  std::string handshake_input_;
  std::uint8_t header_[kHeaderBytes];
  std::size_t header_size_ = 0;
  std::optional<FrameHeader> receiving_;
  std::uint8_t* target_ = nullptr;
  bool is_discarding_ = false;
  std::size_t payload_size_ = 0;  // received so far, with its tag
  std::uint32_t received_crc_ = 0;
  std::uint8_t payload_tag_[kTagBytes];
  std::vector<std::uint8_t> discarded_;

  // Writing: before_, then the payload of the data frame, then after_.
  std::string before_, after_;
  std::size_t before_sent_ = 0;
  std::optional<FrameHeader> sending_;
  const std::uint8_t* payload_ = nullptr;
  std::size_t payload_left_ = 0;
  std::vector<std::uint8_t> own_payload_;
  bool is_blocked_ = false;
  bool is_held_ = false;
  bool is_payload_held_ = false;
  bool is_broken_ = false;
  bool is_ended_ = false;
};

}  // namespace dora
